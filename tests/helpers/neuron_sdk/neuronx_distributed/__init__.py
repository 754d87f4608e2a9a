"""A stand-in for neuronx_distributed: ModelBuilder and NxDModel as libraries/neuronx-distributed's
model_builder_v2_api_reference.rst documents them. Cores are threads, which exchange tensors where a program gathers."""

from __future__ import annotations

import inspect
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import neuron_stand_in as stand_in
import torch
import torch_neuronx

from . import parallel_layers  # noqa: F401

__version__ = "0.18.0"
_DEFAULTS = "--enable-saturate-infinity --auto-cast=none --model-type=transformer -O1"


class NxDParallelState:
    current = None

    def __init__(
        self, world_size=1, rank=0, tensor_model_parallel_size=1, pipeline_model_parallel_size=1, lnc_size=None
    ):
        if world_size % tensor_model_parallel_size:
            raise ValueError("world_size is no multiple of tensor_model_parallel_size")
        self.world_size, self.tensor_model_parallel_size = world_size, tensor_model_parallel_size

    def __enter__(self):
        NxDParallelState.current = self
        return self

    def __exit__(self, *_):
        NxDParallelState.current = None


class ModelBuilder:
    def __init__(self, model, weights_to_skip_layout_optimization=None):
        self.model, self._traced = model, {}
        self.world_size = NxDParallelState.current.world_size if NxDParallelState.current else 1

    def trace(self, args=None, kwargs=None, tag=None, spmd=True):
        if not spmd:
            raise NotImplementedError("MPMD tracing is not currently supported")
        names = _parameters(self.model)
        args = () if args is None else (args,) if isinstance(args, torch.Tensor) else args
        if not isinstance(args, tuple) or not all(isinstance(each, torch.Tensor) for each in args):
            raise ValueError("args must be either None, a single tensor, or a tuple of tensors")
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        if list(given) != names:
            raise ValueError(f"Missing required parameters: {sorted(set(names) - set(given))}")
        inputs = list(given.values())
        call = lambda values: self.model(**dict(zip(names, values, strict=True)))  # noqa: E731
        states = self._changed(call, inputs)
        self._traced[tag] = (names, inputs, call, states)
        return self

    def _changed(self, call, inputs):
        """The buffers that a call gives new values, which so are states."""
        found = []

        def watched(values):
            before = dict(self.model.named_buffers())
            results = call(values)
            after = dict(self.model.named_buffers())
            for name, old in before.items():
                if after[name] is not old:
                    if (after[name].shape, after[name].dtype) != (old.shape, old.dtype):
                        raise RuntimeError(f"HLO generation failed: {name} changes its shape or type")
                    found.append(name)
            return results

        stand_in.check_on_device(self.model, watched, inputs)
        return found

    def compile(self, priority_model_key=None, compiler_workdir=None, compiler_args=None, max_workers=None):
        if not self._traced:
            raise ValueError("No traces available for compilation. Call trace() first.")
        flags = stand_in.words_of(compiler_args or _DEFAULTS)
        if not any(word.startswith("-O") for word in flags):
            flags.append("-O1")
        built = NxDModel(self.world_size)
        for tag, (names, inputs, call, states) in self._traced.items():
            with tempfile.TemporaryDirectory() as folder:
                workdir = Path(compiler_workdir or folder) / tag
                neff = stand_in.compile_graph(flags, workdir, cores=self.world_size)
            built._add(tag, names, inputs, self._script(call, inputs, states, neff), self.model)
        return built

    def _script(self, call, inputs, states, neff):
        def after(results):
            return results, [getattr(*stand_in.holder_of(self.model, name)) for name in states]

        return stand_in.Compiled(self.model, call, after, inputs, states, True, neff).script(inputs)


def _parameters(model):
    signature = inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)
    kinds = {each.kind for each in signature.parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        raise NotImplementedError("Methods with *args or **kwargs are not supported.")
    if not signature.parameters:
        raise ValueError("Model must have at least one parameter")
    return list(signature.parameters)


class _Bundle(torch.nn.Module):
    """What a file holds: the graphs, and in words what they take."""

    def __init__(self, told):
        super().__init__()
        self.told: str = told

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class NxDModel:
    def __init__(self, world_size, start_rank=None, local_ranks_size=None):
        self.world_size, self.loaded_on_neuron = world_size, False
        self._ranks, self._told, self._weights = [{} for _ in range(world_size)], {}, None

    def _add(self, tag, names, inputs, script, model):
        self._told[tag] = {"names": names, "shapes": [list(each.shape) for each in inputs]}
        self._ranks[0][tag] = script

    def save(self, path_to_save, save_weights=False):
        if save_weights:
            raise NotImplementedError("the stand-in saves no weights")
        bundle = _Bundle(json.dumps({"world_size": self.world_size, "graphs": self._told}))
        for tag, script in self._ranks[0].items():
            for name, each in script.weights.named_parameters(recurse=False):
                script.weights._c.setattr(name, torch.zeros((), dtype=each.dtype).expand(each.shape))
            bundle.add_module(f"graph_{tag}", script)
        torch.jit.save(torch.jit.script(bundle), path_to_save)

    @classmethod
    def load(cls, path_to_model, start_rank=None, local_ranks_size=None):
        first = torch_neuronx._load(path_to_model)
        if not hasattr(first, "told"):
            raise ValueError("The Torchscript Model Supplied was not produced with the NxDModel.save method.")
        told = json.loads(first.told)
        found = cls(told["world_size"])
        found._told = told["graphs"]
        for rank in range(found.world_size):
            bundle = first if rank == 0 else torch_neuronx._load(path_to_model)
            found._ranks[rank] = {tag: getattr(bundle, f"graph_{tag}") for tag in found._told}
        return found

    def set_weights(self, sharded_checkpoint):
        if self.loaded_on_neuron:
            raise ValueError("set_weights() was called when the model was already loaded on neuron.")
        if len(sharded_checkpoint) != self.world_size:
            raise ValueError(f"{len(sharded_checkpoint)} checkpoints for {self.world_size} ranks")
        self._weights = sharded_checkpoint

    def to_neuron(self):
        stand_in.need_device()
        if self.world_size > stand_in.core_count():
            raise RuntimeError(f"{self.world_size} NeuronCores are needed, {stand_in.core_count()} are available")
        for rank, (graphs, weights) in enumerate(zip(self._ranks, self._weights, strict=True)):
            given = {stand_in.encoded(name): each for name, each in weights.items()}
            states = {}
            for script in graphs.values():
                for name, each in script.weights.named_parameters(recurse=False):
                    _check(name, each, given[name])
                    script.weights._c.setattr(name, given[name])
                for name, each in script.states.named_parameters(recurse=False):
                    script.states._c.setattr(name, states.setdefault(name, torch.zeros_like(each)))
                script.core.fill_(rank)
        self.loaded_on_neuron = True

    def read_from_neuron_buffer(self, buffer_key, rank):
        return self._buffer(buffer_key, rank).clone()

    def write_to_neuron_buffer(self, tensor, buffer_key, rank):
        target = self._buffer(buffer_key, rank)
        if tensor.shape != target.shape:
            raise KeyError(f"Cannot write tensor of shape {tensor.shape} to neuron buffer with shape {target.shape}")
        with torch.no_grad():
            target.copy_(tensor)

    def _buffer(self, key, rank):
        assert self.loaded_on_neuron, "Model must be loaded on neuron before calling these methods"
        for script in self._ranks[rank].values():
            if stand_in.encoded(key) in dict(script.states.named_parameters(recurse=False)):
                return getattr(script.states, stand_in.encoded(key))
        raise KeyError(f"Could not find neuron buffer: {key} in rank {rank}")

    def __call__(self, *args, model_name=None, forward_mode="default", **kwargs):
        if not self.loaded_on_neuron:
            raise RuntimeError("Model not initialized. Call set_weights() followed by to_neuron()")
        names = next(iter(self._told.values()))["names"]
        inputs = [*args, *(kwargs[name] for name in names[len(args) :])]
        shapes = [list(each.shape) for each in inputs]
        keys = [key for key, told in self._told.items() if told["shapes"] == shapes]
        if not keys:
            raise RuntimeError(f"no route for the shapes {shapes}")
        assert len(keys) == 1 or model_name is not None, f"Got {len(keys)} possible routes but no model_name"
        key = model_name or keys[0]
        group = stand_in.Group(self.world_size)
        with ThreadPoolExecutor(self.world_size) as pool:
            jobs = [pool.submit(group.run, rank, self._ranks[rank][key], *inputs) for rank in range(self.world_size)]
        return jobs[0].result()


def _check(name, each, given):
    if (each.shape, each.dtype) != (given.shape, given.dtype):
        raise RuntimeError(f"{name} is {list(given.shape)} {given.dtype}, not {list(each.shape)} {each.dtype}")
