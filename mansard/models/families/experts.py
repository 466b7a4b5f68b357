"""Experts: on disk one matrix each, in transformers 5 two stacks a block, gate and up one above the other.

`mlp.experts.gate_up_proj` is [E, 2 I, H] and `mlp.experts.down_proj` [E, H, I]; both are plain stacks, so a tensor is
an exact slice and nothing is computed on the way.
"""

from mansard.models.families.family import Shapes, Slot


def expert_shapes(module: str, names: tuple[str, str, str], experts: int, hidden: int, inner: int) -> Shapes:
    """Shapes of all experts; `names` are gate, up and down."""
    gate, up, down = names
    shapes = {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
    return {f"{module}.{e}.{n}.weight": shape for e in range(experts) for n, shape in shapes.items()}


def expert_slot(module: str, names: tuple[str, str, str], name: str) -> Slot | None:
    """The slot of an expert's tensor; None for other tensors."""
    expert, _, rest = name.removeprefix(f"{module}.").partition(".")
    if not name.startswith(f"{module}.") or not (expert.isascii() and expert.isdigit()):
        return None
    gate, up, down = (f"{n}.weight" for n in names)
    if rest == down:
        return Slot("mlp.experts.down_proj", int(expert))
    return {
        gate: Slot("mlp.experts.gate_up_proj", int(expert), 0, 2),
        up: Slot("mlp.experts.gate_up_proj", int(expert), 1, 2),
    }.get(rest)
