"""The options of the `aoti` backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ...options.declaration import describe
from ...options.parallel import ParallelOptions

__all__ = ["DEVICES", "ISAS", "AotiOptions"]

ISAS = ("native", "avx2", "avx512")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class AotiOptions(ParallelOptions):
    """What native code is compiled for.

    Attributes:
        isa: the instructions of the CPU that native code may use: those that this machine has, or a level; of several,
            separated by commas, each is a variant of its own.
        device: where native code runs.
    """

    isa: str = field(
        default="native",
        metadata=describe(
            choices=ISAS,
            section="Precision",
            metavar="LEVEL[,LEVEL…]",
            help_text="Native code for CPUs with: avx2, avx512, what this one has (native); or for several.",
            several=True,
        ),
    )
    device: str = field(
        default="cpu",
        metadata=describe(
            choices=DEVICES, section="Precision", metavar="DEVICE", help_text="Native code for: cpu, cuda."
        ),
    )

    @property
    def levels(self) -> list[str]:
        """The levels of instructions, one or several."""
        return self.isa.split(",")

    def problems(self) -> Iterator[str]:
        """See OptionsPart."""
        yield from super().problems()
        if len(set(self.levels)) != len(self.levels):
            yield f"isa= names a level twice: {self.isa}."
        if len(self.levels) > 1 and self.device != "cpu":
            yield f"isa={self.isa!r} are several levels of a CPU's instructions; with device={self.device!r} give one."

    def variants(self) -> Sequence[AotiOptions]:
        """See BackendOptions: one per level."""
        return [replace(self, isa=level) for level in self.levels]

    def name_parts(self) -> Sequence[str]:
        """See BackendOptions."""
        level = [] if self.isa == "native" else [self.isa]
        return [*level, *super().name_parts()]
