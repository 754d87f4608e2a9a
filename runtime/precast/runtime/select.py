"""Which variant of an artifact runs here? A pure function of the artifact and of facts about the machine."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field

from .artifact.machine import cpu_flags, installed_version
from .artifact.schema import Contract, Variant
from .errors import HostError

__all__ = ["Accepted", "Machine", "Rejected", "choose_variant", "judge", "this_machine"]


@dataclass(frozen=True)
class Machine:
    """What a variant may ask for: `platform` like `linux-x86_64`, CPU flags, devices, installed versions."""

    platform: str
    isa: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset({"cpu"})
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Accepted:
    """The variant runs here."""

    variant: Variant


@dataclass(frozen=True)
class Rejected:
    """The variant does not run here, because of `reason`."""

    variant: Variant
    reason: str


def judge(variant: Variant, machine: Machine) -> Accepted | Rejected:
    """Can `variant` run on `machine`, and if not, why not."""
    host = variant.host
    if host.platforms and machine.platform not in host.platforms:
        return Rejected(variant, f"it was built for {', '.join(host.platforms)}; this is {machine.platform}")
    if host.device not in machine.devices:
        return Rejected(variant, f"it needs the device {host.device}; here are {', '.join(sorted(machine.devices))}")
    if missing := sorted(set(host.isa) - machine.isa):
        return Rejected(variant, f"this CPU lacks {', '.join(missing)}")
    for name, minimum in sorted(host.min_versions.items()):
        if name not in machine.versions:
            return Rejected(variant, f"{name} is not installed (pip install '{name}>={minimum}')")
        if _numbers(machine.versions[name]) < _numbers(minimum):
            have = machine.versions[name]
            return Rejected(variant, f"{name} is {have}, it needs {minimum} (pip install -U '{name}>={minimum}')")
    return Accepted(variant)


def choose_variant(
    contract: Contract,
    machine: Machine,
    name: str | None = None,
    *,
    device: str | None = None,
    provider: str | None = None,
) -> Variant:
    """The first variant that runs on `machine`, or the one called `name`, where `device` and `provider` ask for it.

    Raises HostError with every reason.
    """
    if name is not None and name not in (known := [variant.name for variant in contract.variants]):
        raise HostError(f"The artifact has no variant {name!r}. It has: {', '.join(known)}.")
    rejected = []
    for variant in contract.variants:
        if name is not None and variant.name != name:
            continue
        verdict = _misplaced(variant, device, provider) or judge(variant, machine)
        if isinstance(verdict, Accepted):
            return variant
        rejected.append(verdict)
    reasons = "; ".join(f"{verdict.variant.name}: {verdict.reason}" for verdict in rejected)
    raise HostError(f"No variant of this artifact runs here. {reasons}.")


def _misplaced(variant: Variant, device: str | None, provider: str | None) -> Rejected | None:
    """Whether ONNX Runtime has what is asked for is known when it opens the graph; others run where they were
    compiled to run."""
    if variant.backend == "onnx":
        return None
    if provider is not None:
        return Rejected(variant, f"providers are ONNX Runtime's, and its backend is {variant.backend}")
    if device not in (None, variant.host.device):
        return Rejected(variant, f"it was compiled for the device {variant.host.device}, not for {device}")
    return None


def this_machine(contract: Contract) -> Machine:
    """The facts about this machine that the variants of `contract` ask for."""
    wanted = {name for variant in contract.variants for name in variant.host.min_versions}
    versions = {name: found for name in wanted if (found := installed_version(name))}
    return Machine(f"{platform.system().lower()}-{platform.machine()}", cpu_flags(), frozenset({"cpu"}), versions)


def _numbers(version: str) -> tuple[int, ...]:
    """The release's numbers without zeros at the end: 1.31 is 1.31.0."""
    plain = re.sub(r"(\.0+)+$", "", version.split("+", maxsplit=1)[0])
    return tuple(int(part) for part in re.findall(r"\d+", plain)[:4])
