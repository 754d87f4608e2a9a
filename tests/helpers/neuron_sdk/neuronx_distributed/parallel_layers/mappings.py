"""A stand-in for NxD's collectives over all cores."""

import torch


def gather_from_tensor_model_parallel_region(input_, process_group=None):
    return torch.ops.neuron_stand_in.gather(input_, _cores())


def reduce_from_tensor_model_parallel_region(input_, process_group=None):
    """The sum, written into the argument, as torch.distributed.all_reduce does."""
    return input_.copy_(torch.ops.neuron_stand_in.reduce(input_, _cores()))


def _cores():
    from neuronx_distributed import NxDParallelState

    if NxDParallelState.current is None:
        raise AssertionError("tensor model parallel group is not initialized")
    return NxDParallelState.current.tensor_model_parallel_size
