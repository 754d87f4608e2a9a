"""Choose the variant of an artifact that runs here: a pure function of the artifact and of facts about the machine."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..artifact.schema import Contract, Variant
from ..errors import HostError
from .cuda import CudaHost, cuda_host, gpu_blockers
from .machine import GLIBC, cpu_flags, installed_version, version_numbers
from .neff import NeffHeader, find_headers
from .neuron import NeuronHost, neuron_blockers, neuron_host
from .neuron_sdk import INDEX

__all__ = [
    "Accepted", "Machine", "Rejected", "choose_variant", "judge", "missing_device", "neff_headers", "this_machine",
]  # fmt: skip

_NEURON_PACKAGES = ("libneuronxla", "neuronx-cc", "neuronx-distributed", "torch-neuronx")


@dataclass(frozen=True)
class Machine:
    """The facts that a variant may depend on: `platform` like `linux-x86_64`, CPU flags, devices, installed versions,
    Neuron devices and the GPU."""

    platform: str
    isa: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset({"cpu"})
    versions: dict[str, str] = field(default_factory=dict)
    neuron: NeuronHost | None = None
    cuda: CudaHost | None = None


@dataclass(frozen=True)
class Accepted:
    """The variant runs here."""

    variant: Variant


@dataclass(frozen=True)
class Rejected:
    """The variant does not run here, because of `reason`, which is all reasons in one."""

    variant: Variant
    reason: str


def judge(variant: Variant, machine: Machine, headers: Sequence[NeffHeader] = ()) -> Accepted | Rejected:
    """Decide whether `variant`, whose files hold NEFFs with these `headers`, runs on `machine`, and if not, why."""
    host = variant.host
    if host.platforms and machine.platform not in host.platforms:
        return Rejected(variant, f"it was built for {', '.join(host.platforms)}; this is {machine.platform}")
    reasons = list(_find_reasons(variant, machine, headers))
    return Rejected(variant, "; also, ".join(reasons)) if reasons else Accepted(variant)


def missing_device(variant: Variant, machine: Machine) -> str | None:
    """Why nothing on `machine` could run the variant, whatever is installed: None where it has the device."""
    host = variant.host
    if host.device not in machine.devices:
        why = _explain_missing(variant, machine)
        return f"it needs the device {host.device}; here are {', '.join(sorted(machine.devices))}{why}"
    if host.device == "neuron" and machine.neuron is not None:
        return next(neuron_blockers(variant.compiler.options, [], machine.neuron), None)
    return None


def _find_reasons(variant: Variant, machine: Machine, headers: Sequence[NeffHeader]) -> Iterator[str]:
    host = variant.host
    if host.device == "neuron" and machine.neuron is not None:
        yield from neuron_blockers(variant.compiler.options, headers, machine.neuron)
    elif missing := missing_device(variant, machine):
        yield missing
    elif host.device == "cuda" and machine.cuda is not None:
        yield from gpu_blockers(variant.compiler.options, machine.cuda)
    if flags := sorted(set(host.isa) - machine.isa):
        yield f"this CPU lacks {', '.join(flags)}"
    for name, minimum in sorted(host.min_versions.items()):
        have = machine.versions.get(name)
        if have is not None and version_numbers(have) >= version_numbers(minimum):
            continue
        if name == GLIBC:
            yield f"it needs glibc {minimum}, here is {have or 'none'} (export it here, or on a system as old)"
        elif have is None:
            yield f"{name} is not installed (pip install {_pip_requirement(name, minimum)})"
        else:
            yield f"{name} is {have}, it needs {minimum} (pip install -U {_pip_requirement(name, minimum)})"


def _explain_missing(variant: Variant, machine: Machine) -> str:
    """Why the device is missing, in parentheses, where that is known."""
    known = {
        "neuron": "there is no /dev/neuron0, which the driver aws-neuronx-dkms makes",
        "cuda": machine.cuda.reason if machine.cuda else "",
    }
    hint = known.get(variant.host.device)
    return f" ({hint})" if hint else ""


def _pip_requirement(name: str, minimum: str) -> str:
    index = f" --extra-index-url {INDEX}" if name in _NEURON_PACKAGES else ""
    return f"'{name}>={minimum}'{index}"


def choose_variant(
    contract: Contract,
    machine: Machine,
    name: str | None = None,
    *,
    device: str | None = None,
    provider: str | None = None,
    root: Path | None = None,
) -> Variant:
    """The first variant that runs on `machine`, or the one called `name`, where `device` and `provider` ask for it; of
    several of one backend that with the most of this CPU's instructions. `root` is the artifact's directory, where
    headers of its files are looked at.

    Raises HostError with every reason.
    """
    if name is not None and name not in (known := [variant.name for variant in contract.variants]):
        raise HostError(f"The artifact has no variant {name!r}. It has: {', '.join(known)}.")
    accepted: list[Variant] = []
    rejected = []
    for variant in contract.variants:
        if name is not None and variant.name != name:
            continue
        headers = neff_headers(root, variant) if root else []
        verdict = _reject_device(variant, device, provider) or judge(variant, machine, headers)
        if isinstance(verdict, Accepted):
            accepted.append(variant)
        else:
            rejected.append(verdict)
    if accepted:
        alike = (variant for variant in accepted if variant.backend == accepted[0].backend)
        return max(alike, key=lambda variant: len(variant.host.isa))
    reasons = "; ".join(f"{verdict.variant.name}: {verdict.reason}" for verdict in rejected)
    raise HostError(f"No variant of this artifact runs here. {reasons}.")


def neff_headers(root: Path, variant: Variant) -> list[NeffHeader]:
    """The headers of all NEFFs in the graphs of a variant for Neuron; of a file that is missing, which is found when
    files are verified, none. Raises IntegrityError where one cannot be read."""
    if variant.host.device != "neuron":
        return []
    paths = [root / graph.file for graph in variant.graphs]
    return [header for path in paths if path.is_file() for header in find_headers(path)]


def _reject_device(variant: Variant, device: str | None, provider: str | None) -> Rejected | None:
    """Reject a variant that cannot run on `device` or with `provider`. ONNX Runtime decides that when it opens a graph;
    other backends run where they were compiled to run."""
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
    asks_neuron = any(variant.host.device == "neuron" for variant in contract.variants)
    neuron = neuron_host() if asks_neuron else None
    # PyTorch is imported to know of GPUs, which takes a second.
    cuda = cuda_host() if any(variant.host.device == "cuda" for variant in contract.variants) else None
    there = {"cpu": True, "neuron": neuron is not None, "cuda": cuda is not None and bool(cuda.capability)}
    devices = frozenset(name for name, is_there in there.items() if is_there)
    return Machine(f"{platform.system().lower()}-{platform.machine()}", cpu_flags(), devices, versions, neuron, cuda)
