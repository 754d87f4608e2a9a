"""The Neuron devices of this machine, read from the kernel's files, and why a compiled graph does not run there.

Neither the SDK nor a device is needed. Sources, in the Neuron documentation: the driver's files are those of
tools/neuron-sys-tools/neuron-sysfs-user-guide.rst; the variables that give a process its cores those of
neuron-runtime/guides/configuration-guide.rst and about-neuron/arch/neuron-features/logical-neuroncore-config.rst; that
compiler and runtime fit within a major version says compiler/neuronx-cc/faq.rst.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .neff import NeffHeader

__all__ = ["ARCHITECTURES", "NEFF_MAJORS", "ROOT_VARIABLE", "NeuronHost", "neuron_blockers", "neuron_host"]

ARCHITECTURES = {"inf1": "NCv1", "inf2": "NCv2", "trn1": "NCv2", "trn1n": "NCv2", "trn2": "NCv3"}
"""Instance types whose cores are alike run each other's graphs."""
NEFF_MAJORS = (0, 2)
"""The major versions of the format that Neuron Runtime 2.x takes, both included: of a higher one it says "accepted
version range: 0.x-2.x"."""
ROOT_VARIABLE = "PRECAST_NEURON_ROOT"
"""Where the host's /dev, /proc and /sys are seen, if not at /: in a container that has them elsewhere."""

_DEVICES = "sys/devices/virtual/neuron_device"


@dataclass(frozen=True)
class NeuronHost:
    """Attributes:
    instance: the family of the machine, as "inf2"; empty where the machine does not say.
    cores: how many NeuronCores this process may use, logical ones where they are grouped.
    lnc_size: physical cores to a logical one.
    """

    instance: str
    cores: int
    lnc_size: int = 1


def neuron_host(environment: Mapping[str, str] = os.environ) -> NeuronHost | None:
    """The Neuron devices that this process can see; None without any."""
    root = Path(environment.get(ROOT_VARIABLE) or "/")
    devices = sorted(path.name for path in (root / "dev").glob("neuron*") if re.fullmatch(r"neuron\d+", path.name))
    if not devices:
        return None
    instance = _instance_family(root, devices[0])
    lnc_size = _lnc_size(instance, environment)
    physical = sum(_core_count(root / _DEVICES / name, instance) for name in devices)
    return NeuronHost(instance, _visible_cores(physical // lnc_size, environment), lnc_size)


def neuron_blockers(options: Mapping[str, object], headers: Sequence[NeffHeader], host: NeuronHost) -> Iterator[str]:
    """Why graphs compiled with `options` (those of the variant's `compiler`), whose files hold `headers`, do not run on
    `host`: every reason, each in words."""
    target = str(options.get("instance_type", ""))
    if target and host.instance and _architecture_of(target) != _architecture_of(host.instance):
        alike = [name for name in ARCHITECTURES if _architecture_of(name) == _architecture_of(target)]
        yield (
            f"it was compiled for {target}, so it runs on {', '.join(alike) or target}; this is {host.instance} "
            f"(compile it with instance_type={host.instance!r})"
        )
    needed = _cores_needed(options, headers)
    if needed > host.cores:
        yield (
            f"it needs {needed} NeuronCores; this process may use {host.cores} (NEURON_RT_VISIBLE_CORES says which, "
            f"tensor_parallel compiles it for fewer)"
        )
    yield from _header_blockers(headers, host)


def _header_blockers(headers: Sequence[NeffHeader], host: NeuronHost) -> Iterator[str]:
    """Why these NEFFs do not run on `host`, each reason once."""
    first, last = NEFF_MAJORS
    for version in sorted({header.version for header in headers if not first <= header.major <= last}):
        yield (
            f"its NEFF has version {version}; Neuron Runtime takes {first}.x to {last}.x (upgrade "
            f"aws-neuronx-runtime-lib and precast, or compile it with the SDK that is here)"
        )
    for size in sorted({header.lnc_size for header in headers if header.lnc_size > 1} - {host.lnc_size}):
        yield (
            f"its NEFF wants {size} physical cores to a logical one; here it is {host.lnc_size} "
            f"(NEURON_LOGICAL_NC_CONFIG={size})"
        )


def _architecture_of(instance: str) -> str:
    return ARCHITECTURES.get(instance, instance)


def _cores_needed(options: Mapping[str, object], headers: Sequence[NeffHeader]) -> int:
    asked = options.get("cores", 1)
    return max([asked if isinstance(asked, int) else 1, *(header.cores for header in headers)])


def _instance_family(root: Path, device: str) -> str:
    """The family of the instance: from the driver, else from the firmware's name of the machine ("inf2.xlarge")."""
    told = _read_text(root / _DEVICES / device / "info/architecture/instance_type")
    named = told or _read_text(root / "sys/devices/virtual/dmi/id/product_name")
    return named.partition(".")[0].strip().lower()


def _core_count(device: Path, instance: str) -> int:
    """Physical cores of a device: the driver's number, else that of its architecture."""
    told = _read_text(device / "core_count")
    return int(told) if told.isdigit() else {"NCv1": 4, "NCv3": 8}.get(_architecture_of(instance), 2)


def _lnc_size(instance: str, environment: Mapping[str, str]) -> int:
    given = environment.get("NEURON_LOGICAL_NC_CONFIG", "")
    if given in ("1", "2"):
        return int(given)
    return 2 if _architecture_of(instance) == "NCv3" else 1


def _visible_cores(cores: int, environment: Mapping[str, str]) -> int:
    """How many of the machine's cores the environment leaves this process; the runtime refuses malformed values."""
    ranges = [part.partition("-") for part in environment.get("NEURON_RT_VISIBLE_CORES", "").split(",") if part.strip()]
    if ranges and all(start.strip().isdigit() and (end or start).strip().isdigit() for start, _, end in ranges):
        return min(cores, sum(max(0, int(end or start) - int(start) + 1) for start, _, end in ranges))
    given = environment.get("NEURON_RT_NUM_CORES", "")
    return min(cores, int(given)) if given.isdigit() and int(given) else cores


def _read_text(path: Path) -> str:
    """The text of a small file; empty where there is none to read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
