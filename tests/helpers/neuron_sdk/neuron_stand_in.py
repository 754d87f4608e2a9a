"""What the stand-ins for the Neuron SDK have in common: the compiler, its files and its failures, and one machine.

The stand-ins keep the contract that AWS documents — signatures, static shapes, flat tuples of tensors, state on the
device, versions, the layout of a NEFF's header — refuse what breaks it, and compute on the CPU. They are written from
the documentation alone and share no code with precast, so that each checks the other.

The environment says what goes wrong: `STAND_IN_FAULT=error|killed|crash|lost@PART` while compiling into a folder whose
path contains PART, and PRECAST_NEURON_ROOT where this machine's devices are seen.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import signal
import struct
import sys
import tarfile
import threading
import uuid
from contextlib import contextmanager
from pathlib import Path

import torch

COMPILER = "2.22.1111.0+stand.in"
HEADER = struct.Struct("<QQQQQ128sI32s16s256sI64sQI468s")
"""`neff_header_t` of neuron-runtime/explore/work-with-neff-files.rst."""
NEFF_MAJOR, NEFF_MINOR = 2, 0


# ------------------------------------------------------------------- this machine


def core_count():
    """The NeuronCores of this machine, 0 without a device."""
    root = Path(os.environ.get("PRECAST_NEURON_ROOT", "/nowhere"))
    devices = sorted((root / "sys/devices/virtual/neuron_device").glob("neuron*"))
    return sum(int((device / "core_count").read_text()) for device in devices)


def need_device():
    if not core_count():
        raise RuntimeError(
            "The PyTorch Neuron Runtime could not be initialized. Neuron Driver issues are logged\n"
            "to your system logs. See the Neuron Runtime's troubleshooting guide for help on this topic."
        )


# ------------------------------------------------------------------- neuronx-cc


class _Flags(argparse.ArgumentParser):
    def error(self, message):
        print(f"neuronx-cc: error: {message}", file=sys.stderr)
        raise RuntimeError("neuronx-cc failed with 2")


def _parser():
    """The options of `neuronx-cc compile`, as its reference lists them."""
    flags = _Flags(prog="neuronx-cc", allow_abbrev=False, add_help=False)
    flags.add_argument("--target", choices=["inf2", "trn1", "trn1n", "trn2"], required=True)
    flags.add_argument("--model-type", choices=["generic", "transformer", "unet-inference"], default="generic")
    flags.add_argument("--auto-cast", choices=["none", "matmult", "all"], default="none")
    flags.add_argument("--auto-cast-type", choices=["bf16", "fp16", "tf32", "fp8_e4m3"], default="bf16")
    flags.add_argument("--native-int64", choices=["default", "enabled", "disabled"])
    flags.add_argument("--distribution-strategy", choices=["llm-training"])
    flags.add_argument("--logical-nc-config", "-lnc", "--lnc", type=int, choices=[1, 2])
    flags.add_argument("--optlevel", "-O", type=int, choices=[1, 2, 3], default=2)
    flags.add_argument("--enable-saturate-infinity", action="store_true")
    flags.add_argument("--enable-fast-loading-neuron-binaries", action="store_true")
    flags.add_argument("--logfile")
    flags.add_argument("--verbose")
    return flags


def words_of(arguments):
    return [] if arguments is None else shlex.split(arguments) if isinstance(arguments, str) else list(arguments)


def compile_graph(arguments, workdir, *, cores=1):
    """The bytes of a NEFF; fails as the compiler does. `arguments`: words, or one text."""
    words = words_of(arguments)
    asked = _parser().parse_args(words)
    override = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")
    if override not in (None, asked.target):
        raise RuntimeError(f"the platform is {override} and --target is {asked.target}")
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "command.txt").write_text(shlex.join(["neuronx-cc", "compile", "--framework", "XLA", *words]))
    _fail(str(workdir))
    lnc = asked.logical_nc_config or (2 if asked.target == "trn2" else 1)
    if lnc == 2 and asked.target != "trn2":
        _report("[NCC_EARG001] Logical Neuron Core (LNC) configuration is not supported by the target")
        raise RuntimeError("neuronx-cc failed with 70")
    neff = make_neff(cores=cores, lnc=lnc)
    (workdir / "graph.neff").write_bytes(neff)
    return neff


def make_neff(*, cores=1, lnc=1, major=NEFF_MAJOR, minor=NEFF_MINOR, name="graph"):
    """A header, and a tarball that says that it computes nothing."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        told = b'{"stand_in": true}'
        entry = tarfile.TarInfo("sg00/def.json")
        entry.size = len(told)
        tar.addfile(entry, io.BytesIO(told))
    data = packed.getvalue()
    header = HEADER.pack(
        2, HEADER.size, len(data), major, minor, COMPILER.encode(), cores, b"\x11" * 32, uuid.uuid4().bytes,
        name.encode(), cores, bytes([1]), 0, lnc, b"",
    )  # fmt: skip
    assert len(header) == 1024
    return header + data


def _report(line):
    for level, text in (("ERROR", " An Internal Compiler Error has occurred"), ("USER", line)):
        print(
            f"2026-11-21T00:04:00Z {level} 5521 [neuronxcc.driver.CommandDriver]: {text}", file=sys.stderr, flush=True
        )


def _fail(workdir):
    kind, _, part = os.environ.get("STAND_IN_FAULT", "").partition("@")
    if not kind or part not in workdir:
        return
    if kind == "error":
        _report("[NCC_EVRF001] An unsupported operator was used: triangular-solve.")
        raise RuntimeError("neuronx-cc failed with 70")
    if kind == "killed":
        text = "[F137] neuronx-cc was forcibly killed - This most commonly occurs due to insufficient system memory."
        print(text, file=sys.stderr, flush=True)
        raise RuntimeError("neuronx-cc failed with -9")
    os.kill(os.getpid(), {"crash": signal.SIGSEGV, "lost": signal.SIGKILL}[kind])


# ------------------------------------------------------------------- graphs


RUNS = []
"""The core of every execution, in order."""
_LIBRARY = torch.library.Library("neuron_stand_in", "DEF")
_LIBRARY.define("enter(Tensor x, int[] shape, str dtype, Tensor core, int index) -> Tensor")
_LIBRARY.define("gather(Tensor x, int cores) -> Tensor")
_LIBRARY.define("reduce(Tensor x, int cores) -> Tensor")


def _enter(x, shape, dtype, core, index):
    if list(x.shape) != list(shape) or str(x.dtype) != dtype:
        raise RuntimeError(
            f"Incorrect tensor shape or type at input tensor #{index}: received {list(x.shape)} {x.dtype}, expected "
            f"{list(shape)} {dtype}"
        )
    if index == 0:
        RUNS.append(int(core))
    return x.clone()


def _gather(x, cores):
    """Every core's part, one beside the other."""
    return torch.cat(_exchange(x, cores), dim=-1)


def _reduce(x, cores):
    return sum(_exchange(x, cores))


def _exchange(x, cores):
    """What the cores have that run together, or as many times what this one has."""
    group = getattr(_THREAD, "group", None)
    return [x] * cores if group is None else group.exchange(_THREAD.rank, x)


_LIBRARY.impl("enter", _enter, "CPU")
_LIBRARY.impl("gather", _gather, "CPU")
_LIBRARY.impl("reduce", _reduce, "CPU")
_LIBRARY.impl("reduce", lambda x, cores: x.clone(), "Meta")
_LIBRARY.impl("gather", lambda x, cores: x.new_empty([*x.shape[:-1], x.shape[-1] * cores]), "Meta")
_THREAD = threading.local()


class Group:
    """Cores that run one program, each in a thread, and exchange tensors."""

    def __init__(self, size):
        self._parts, self._barrier = [None] * size, threading.Barrier(size)

    def exchange(self, rank, x):
        self._parts[rank] = x
        self._barrier.wait(60)
        # What others have may be written over once all have seen it.
        found = [each.clone() for each in self._parts]
        self._barrier.wait(60)
        return found

    def run(self, rank, function, *args):
        _THREAD.group, _THREAD.rank = self, rank
        try:
            return function(*args)
        except BaseException:
            self._barrier.abort()
            raise
        finally:
            _THREAD.group = None


def holder_of(module, name):
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


def put(module, name, tensor):
    """Set a parameter or buffer to any tensor."""
    owner, last = holder_of(module, name)
    (owner._parameters if last in owner._parameters else owner._buffers)[last] = tensor


@contextmanager
def swapped(module, tensors):
    """The module with other tensors; what it had comes back."""
    before = {name: getattr(*holder_of(module, name)) for name in tensors}
    for name, tensor in tensors.items():
        put(module, name, tensor)
    try:
        yield
    finally:
        for name, tensor in before.items():
            put(module, name, tensor)


def held_by(function):
    """All parameters and buffers of a module by name, tied ones under each; nothing of a function."""
    if not isinstance(function, torch.nn.Module):
        return {}
    return {
        **dict(function.named_parameters(remove_duplicate=False)),
        **dict(function.named_buffers(remove_duplicate=False)),
    }


def flat(results):
    """A flat tuple of tensors. Raises for anything else: the tracer has no names and no nesting."""
    results = (results,) if isinstance(results, torch.Tensor) else results
    if not isinstance(results, (tuple, list)) or not all(isinstance(each, torch.Tensor) for each in results):
        raise TypeError("Tracing allows a tensor or a flat tuple or list of tensors as outputs")
    return list(results)


def check_on_device(function, call, inputs):
    """Run on another device than the CPU, without values: a tensor of the CPU, or a decision by a value, fails there.
    Returns the outputs, on that device."""
    elsewhere = {name: each.detach().to("meta") for name, each in held_by(function).items()}
    with torch.no_grad(), swapped(function, elsewhere) if elsewhere else _nothing():
        return flat(call([each.to("meta") for each in inputs]))


@contextmanager
def _nothing():
    yield


class Compiled(torch.nn.Module):
    """A graph as it is saved: states, weights and the NEFF beside what computes it on the CPU.

    `call(inputs)` runs `function`, and `after(results)` gives its outputs and the new states, in their order.
    """

    def __init__(self, function, call, after, inputs, states, separated, neff):
        super().__init__()
        self._plain = (function, call, after, [(list(each.shape), str(each.dtype)) for each in inputs])
        self._names = {"states": list(states), "weights": [name for name in held_by(function) if name not in states]}
        self.states, self.weights = torch.nn.Module(), torch.nn.Module()
        held = held_by(function)
        for name in states:
            value = torch.nn.Parameter(torch.zeros_like(held[name]), requires_grad=False)
            self.states.register_parameter(encoded(name), value)
        for name in self._names["weights"]:
            value = torch.nn.Parameter(held[name].detach().clone(), requires_grad=False)
            if separated:
                self.weights.register_parameter(encoded(name), value)
            else:
                self.weights.register_buffer(encoded(name), value.data)
        self.register_buffer("neff", torch.frombuffer(bytearray(neff), dtype=torch.uint8))
        self.register_buffer("core", torch.tensor(-1))

    def forward(self, *inputs):
        function, call, after, wanted = self._plain
        given = [
            torch.ops.neuron_stand_in.enter(each, shape, dtype, self.core, index)
            for index, (each, (shape, dtype)) in enumerate(zip(inputs, wanted, strict=True))
        ]
        tensors = {
            name: getattr(getattr(self, kind), encoded(name)) for kind in ("states", "weights")
            for name in self._names[kind]
        }  # fmt: skip
        with swapped(function, tensors) if tensors else _nothing():
            outputs, new = after(flat(call(given)))
        for name, value in zip(self._names["states"], new, strict=True):
            tensors[name].copy_(value)
        return tuple(outputs)

    def script(self, inputs):
        """The TorchScript module, its states zero."""
        with torch.no_grad():
            traced = torch.jit.trace(self, tuple(inputs), check_trace=False, strict=False)
            for each in traced.states.parameters():
                each.zero_()
        return traced


def encoded(name):
    """torch_neuronx writes names of weights so."""
    return name.replace(".", "->")
