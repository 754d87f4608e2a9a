"""The options of the `aoti` backend."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...options.backend_options import BackendOptions
from ...options.declaration import describe

__all__ = ["DEVICES", "ISAS", "AotiOptions"]

ISAS = ("native", "avx2", "avx512")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class AotiOptions(BackendOptions):
    """What native code is compiled for.

    Attributes:
        isa: the instructions of the CPU that native code may use: those that this machine has, or a level.
        device: where native code runs.
    """

    isa: str = field(
        default="native",
        metadata=describe(
            choices=ISAS,
            section="Precision",
            metavar="LEVEL",
            help_text="Native code for CPUs with: avx2, avx512, or what this one has.",
        ),
    )
    device: str = field(
        default="cpu",
        metadata=describe(
            choices=DEVICES, section="Precision", metavar="DEVICE", help_text="Native code for: cpu, cuda."
        ),
    )
