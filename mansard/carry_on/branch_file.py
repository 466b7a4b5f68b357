"""A branch on disk: one safetensors file that says for which base it was trained (description.py).

It is refused beside any other base, when a tensor is missing, and when a value is not finite.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mansard.carry_on.branch import Branch, problems_of
from mansard.composition.description import BranchDescription, check_base, described
from mansard.composition.mixture import check_others
from mansard.errors import BadInput, Corrupt
from mansard.records import SnapshotId


def branch_bytes(description: BranchDescription, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> bytes:
    """The file. BadInput where a tensor is missing or a value is not finite."""
    plain = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    _check(description, plain, "the branch")
    data: bytes = save(plain, metadata=description.metadata())
    return data


def load_branch(
    path: Path, base: SnapshotId, dtype: torch.dtype | None = None, others: Sequence[SnapshotId] = ()
) -> tuple[Branch, BranchDescription]:
    """The branch in `dtype` (default: the file's). BadInput for another base than it was trained for, or other ones
    beside it; Corrupt where the file cannot be read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            description = described(file.metadata() or {}, str(path))
            check_base(description, base, str(path))
            check_others(description, others, str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise Corrupt(f"{path}: cannot be read: {error}; take the branch out of the store again") from error
    _check(description, tensors, str(path))
    with torch.device("meta"):
        branch = Branch(description.shape)
    branch.load_state_dict({n: t if dtype is None else t.to(dtype) for n, t in tensors.items()}, assign=True)
    return branch, description


def _check(description: BranchDescription, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    problems = problems_of(description.shape, ((n, tuple(t.shape)) for n, t in tensors.items()))
    if problems:
        raise BadInput(f"{where}: {len(problems)} tensors are wrong, e.g. {problems[0]}; make the branch again")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BadInput(f"{where}: {name} holds values that are not finite; make the branch again")
