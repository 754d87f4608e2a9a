"""A stand-in for NxD's collectives."""

import torch


def gather_from_tensor_model_parallel_region(input_, process_group=None):
    from neuronx_distributed import NxDParallelState

    if NxDParallelState.current is None:
        raise AssertionError("tensor model parallel group is not initialized")
    return torch.ops.neuron_stand_in.gather(input_, NxDParallelState.current.tensor_model_parallel_size)
