"""A stand-in for torch_neuronx: the part of frameworks/torch/torch-neuronx/api-reference-guide/inference that precast
calls, with the signatures that are documented there."""

from __future__ import annotations

import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import neuron_stand_in as stand_in
import torch

__version__ = "2.9.0.2.11.1111"

LOADS = []
"""(file, start_nc) of everything that was put on a core."""
_PLACE = {"start_nc": -1, "nc_count": -1}


def trace(
    func,
    example_inputs,
    *_,
    input_output_aliases={},  # noqa: B006
    compiler_workdir=None,
    compiler_args=None,
    partitioner_config=None,
    inline_weights_to_neff=True,
    cpu_backend=False,
):
    if _:
        raise TypeError("trace() takes keyword arguments behind example_inputs")
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else example_inputs
    if not isinstance(inputs, tuple) or not all(isinstance(each, torch.Tensor) for each in inputs):
        raise TypeError("example_inputs must be a tensor or a tuple of tensors")
    if any(each.device.type != "cpu" for each in inputs):
        raise RuntimeError("example_inputs must be on the CPU")
    _check_place(cpu_backend, compiler_args)
    outputs = stand_in.check_on_device(func, lambda given: func(*given), inputs)
    states = _states(func, input_output_aliases, outputs)
    with tempfile.TemporaryDirectory() as folder:
        neff = stand_in.compile_graph(compiler_args, compiler_workdir or folder)

    def after(results):
        aliased = list(states.values())
        return [each for index, each in enumerate(results) if index not in aliased], [results[i] for i in aliased]

    whole = stand_in.Compiled(func, lambda given: func(*given), after, inputs, states, not inline_weights_to_neff, neff)
    return whole.script(inputs)


def _check_place(cpu_backend, compiler_args):
    words = stand_in.words_of(compiler_args)
    if cpu_backend and not any(word.startswith("--target") for word in words):
        raise ValueError("cpu_backend=True needs --target in compiler_args")
    if not cpu_backend:
        stand_in.need_device()


def _states(func, aliases, outputs):
    """The names of the states, and which outputs they take."""
    names = {id(each): name for name, each in stand_in.held_by(func).items() if isinstance(each, torch.nn.Parameter)}
    found = {}
    for tensor, index in aliases.items():
        if id(tensor) not in names:
            raise ValueError("input_output_aliases has a tensor that is no parameter of the module")
        if not 0 <= index < len(outputs):
            raise IndexError(f"input_output_aliases names output {index} of {len(outputs)}")
        if (tensor.shape, tensor.dtype) != (outputs[index].shape, outputs[index].dtype):
            raise ValueError(f"output {index} is not of the shape and type of the state that it is aliased with")
        found[names[id(tensor)]] = index
    if len(set(found.values())) != len(found):
        raise ValueError("input_output_aliases names an output twice")
    return found


@contextmanager
def neuron_cores_context(start_nc=-1, nc_count=-1):
    stand_in.need_device()
    if start_nc + max(nc_count, 1) > stand_in.core_count():
        raise ValueError(f"nc_count {nc_count} from {start_nc} is invalid")
    before = dict(_PLACE)
    _PLACE.update(start_nc=start_nc, nc_count=nc_count)
    try:
        yield
    finally:
        _PLACE.update(before)


def set_neuron_cores(trace, start_nc=-1, nc_count=-1):
    trace.core.fill_(start_nc)


def move_trace_to_device(trace, device_id):
    if not 0 <= device_id < stand_in.core_count():
        raise ValueError(f"device_id {device_id} is invalid")
    trace.core.fill_(device_id)


def replace_weights(neuron_model, weights):
    if not isinstance(neuron_model, torch.jit.ScriptModule):
        raise TypeError("replace_weights takes a traced model")
    weights = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    held = dict(neuron_model.weights.named_parameters(recurse=False))
    if not held:
        warnings.warn("the model has no separated weights", stacklevel=2)
        return
    given = {stand_in.encoded(name): each for name, each in weights.items()}
    if given.keys() != held.keys():
        raise KeyError(f"weights that differ: {sorted(given.keys() ^ held.keys())[:3]}")
    for name, each in given.items():
        if (each.shape, each.dtype) != (held[name].shape, held[name].dtype):
            raise ValueError(
                f"{name} is {list(each.shape)} {each.dtype}, not {list(held[name].shape)} {held[name].dtype}"
            )
        neuron_model.weights._c.setattr(name, each)


_load = torch.jit.load


def _load_on_core(f, *args, **kwargs):
    """Loading puts the NEFF on a core at once."""
    module = _load(f, *args, **kwargs)
    if hasattr(module, "neff"):
        stand_in.need_device()
        fields = stand_in.HEADER.unpack(bytes(module.neff[:1024].tolist()))
        if fields[3] > stand_in.NEFF_MAJOR:
            raise RuntimeError(
                f"Could not load the model status=10 message=Unsupported NEFF Version {fields[3]}.{fields[4]}"
            )
        # Round-robin where nobody says.
        core = _PLACE["start_nc"] if _PLACE["start_nc"] >= 0 else len(LOADS) % stand_in.core_count()
        LOADS.append((Path(str(f)).name, core))
        module.core.fill_(core)
    return module


torch.jit.load = _load_on_core
