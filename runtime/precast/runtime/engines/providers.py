"""ONNX Runtime's execution providers: the devices that each serves, how to get it, and the choice of one.

An `onnx` artifact is made for the CPU and checked there. Elsewhere the same graph runs, in float32 as far as a provider
can be told to; what it has no kernel for ONNX Runtime computes on the CPU in between, such as our decoders' attention
everywhere but on CUDA. Nothing here imports ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import HostError, UsageError

__all__ = ["DEVICES", "PROVIDERS", "ProviderChoice", "Provider", "check_provider", "choose_provider", "default_device"]

Arguments = list[str | tuple[str, dict[str, str]]]


@dataclass(frozen=True)
class Provider:
    """One of ONNX Runtime's execution providers.

    Attributes:
        name: ours, for `provider=` and `--provider`.
        full_name: ONNX Runtime's.
        devices: what it runs on, and the options that say so; the first is its default.
        install: how to get a build of ONNX Runtime that has it.
        needs: what must be on the machine besides.
        threads: the option that takes the number of threads, if it runs on the CPU and has one.
        helpers: names of those that are asked before the CPU for what it cannot compute.
    """

    name: str
    full_name: str
    devices: Mapping[str, Mapping[str, str]]
    install: str
    needs: str
    threads: str = ""
    helpers: tuple[str, ...] = ()


_GPU_BUILD = "pip install 'onnxruntime-gpu[cuda,cudnn]'"

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", {"cpu": {}}, "pip install onnxruntime", "any machine"),
        Provider(
            # Products are otherwise rounded to ten bits (TF32).
            "cuda", "CUDAExecutionProvider", {"cuda": {"use_tf32": "0"}}, _GPU_BUILD,
            "an NVIDIA GPU with its driver, CUDA and cuDNN",
        ),
        Provider(
            "tensorrt", "TensorrtExecutionProvider", {"cuda": {}}, _GPU_BUILD,
            "an NVIDIA GPU with its driver, CUDA, cuDNN and TensorRT", helpers=("cuda",),
        ),
        Provider(
            "openvino", "OpenVINOExecutionProvider",
            {
                # Its own choice for a GPU is half precision; an NPU has no other.
                "cpu": {"device_type": "CPU", "precision": "FP32"},
                "gpu": {"device_type": "GPU", "precision": "FP32"},
                "npu": {"device_type": "NPU"},
            },
            "pip install onnxruntime-openvino", "an Intel CPU, GPU or NPU with its driver", threads="num_of_threads",
        ),
        Provider(
            "coreml", "CoreMLExecutionProvider",
            {
                "coreml": {"MLComputeUnits": "ALL"},
                "cpu": {"MLComputeUnits": "CPUOnly"},
                "gpu": {"MLComputeUnits": "CPUAndGPU"},
                "npu": {"MLComputeUnits": "CPUAndNeuralEngine"},
            },
            "pip install onnxruntime", "a Mac",
        ),
    )
}  # fmt: skip
DEVICES = tuple(dict.fromkeys(device for provider in PROVIDERS.values() for device in provider.devices))


@dataclass(frozen=True)
class ProviderChoice:
    """A provider on one of its devices."""

    provider: Provider
    device: str

    @property
    def is_cpu_provider(self) -> bool:
        """Whether it is ONNX Runtime's own CPU provider, which works in our arrays and can save packed weights."""
        return self.provider.name == "cpu"

    def arguments(self, threads: int) -> Arguments:
        """The `providers` of an InferenceSession: this one, its helpers, and the CPU last."""
        options = dict(self.provider.devices[self.device])
        if self.device == "cpu" and self.provider.threads:
            options[self.provider.threads] = str(threads)
        helpers = [PROVIDERS[name] for name in self.provider.helpers]
        asked: Arguments = [(self.provider.full_name, options)]
        asked += [(each.full_name, dict(each.devices[self.device])) for each in helpers]
        return ["CPUExecutionProvider"] if self.is_cpu_provider else [*asked, "CPUExecutionProvider"]

    def __str__(self) -> str:
        return f"{self.provider.full_name} on {self.device}"


def check_provider(device: str | None, provider: str | None, further: Iterable[str] = ()) -> None:
    """Raise UsageError for unknown providers or devices, or unsupported pairs; it lists the choices.

    `further` are devices besides ONNX Runtime's: those that variants were compiled for.
    """
    known = tuple(dict.fromkeys([*DEVICES, *further]))
    if device is not None and device not in known:
        raise UsageError(f"There is no device {device!r}. The devices are: {', '.join(known)}.")
    if provider is None:
        return
    row = _get_provider(provider)
    if device is not None and device not in row.devices:
        raise UsageError(
            f"The provider {row.name!r} does not run on the device {device!r}, but on: {', '.join(row.devices)}. "
            f"Leave one of the two out, or choose another."
        )


def default_device(provider: str | None) -> str:
    """The default device of a provider. Raises UsageError for an unknown one."""
    return next(iter(PROVIDERS["cpu" if provider is None else _get_provider(provider).name].devices))


def choose_provider(device: str, provider: str | None, available: Sequence[str], version: str) -> ProviderChoice:
    """The provider that is asked for, or the first that serves the device and is among `available`, ONNX Runtime's
    names of those in this build.

    Raises UsageError for unknown names, HostError where this build lacks the provider: nothing else is taken instead.
    """
    check_provider(device, provider)
    fitting = [_get_provider(provider)] if provider else [each for each in PROVIDERS.values() if device in each.devices]
    for each in fitting:
        if each.full_name in available:
            return ProviderChoice(each, device)
    ways = "; ".join(f"{each.name} with {each.install}, on {each.needs}" for each in fitting)
    raise HostError(
        f"ONNX Runtime {version} here cannot run on {_describe_request(device, provider)}: it was built with "
        f"{', '.join(available)}. After pip uninstall of that build, whose files the next would share, install {ways}. "
        f"Or leave device and provider out to run on the CPU."
    )


def _describe_request(device: str, provider: str | None) -> str:
    return f"the device {device!r}" + (f" with the provider {provider!r}" if provider else "")


def _get_provider(provider: str) -> Provider:
    """A provider by our name for it or by ONNX Runtime's."""
    for each in PROVIDERS.values():
        if provider in (each.name, each.full_name):
            return each
    raise UsageError(f"There is no provider {provider!r}. The providers are: {', '.join(PROVIDERS)}.")
