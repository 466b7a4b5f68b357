"""Frozen means frozen, and it is measured: which tensors train, and digests of the others as they stand in memory.

Names are exact names of parameters and buffers in the module tree, aliases of tied tensors included; nothing is chosen
by substring. A digest is BLAKE3 over a tensor's bytes alone, so it equals the store's object digest where the type in
memory is the type on disk. Does not cover optimizer state.
"""

from collections.abc import Iterable, Mapping, Set

import torch
from torch import nn

from mansard.digest import digest_bytes


def freeze_except(model: nn.Module, names: Set[str]) -> list[str]:
    """Let exactly the parameters `names` train; returns the sorted names of all other parameters and buffers.

    A tensor that has several names (tied embeddings) trains when any of them is listed, and then none of them is
    returned. Raises ValueError when a name is no parameter of the model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = sorted(names - parameters.keys())
    if unknown:
        raise ValueError(f"{unknown[0]} is no parameter of the model; names are exact, e.g. {next(iter(parameters))}")
    trained = {id(parameters[name]) for name in names}
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trained)
    return sorted(name for name, tensor in _tensors(model).items() if id(tensor) not in trained)


def digest_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name -> BLAKE3 of the tensor's bytes in memory; parameters and buffers, quantized ones too."""
    tensors = _tensors(model)
    return {name: digest_bytes(_bytes_of(tensors[name])) for name in sorted(names)}


def compare(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Sorted names whose digests differ, those that only one side has included."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
