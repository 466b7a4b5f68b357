"""Which tensors train, which are frozen, and what is said of it before the first step.

New tensors are named exactly, by the family's adapter, never by a substring that an original block shares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mansard.errors import BadInput, StageFailed
from mansard.models.expand import NewBlock, model_config, read_expansion
from mansard.models.families import family_of
from mansard.models.freeze import compare, digest_tensors, freeze_except
from mansard.records import SnapshotId
from mansard.specs import Data, LearningRates, Train
from mansard.store import Store
from mansard.training.memory import expected_bytes
from mansard.training.optimizer import Group


@dataclass(frozen=True, slots=True)
class Frozen:
    """Digests of the frozen tensors as they stood in memory."""

    digests: Mapping[str, str]

    def check(self, model: Any) -> None:  # noqa: ANN401 - a transformers model
        """StageFailed names the tensors that are no longer what they were."""
        changed = compare(self.digests, digest_tensors(model, self.digests))
        if changed:
            raise StageFailed(
                f"{len(changed)} frozen tensors changed during training, e.g. {', '.join(changed[:3])}; "
                "nothing of this run was kept"
            )


def new_tensor_names(store: Store, expansion: SnapshotId) -> frozenset[str]:
    """The checkpoint's names of every tensor of the newest storey."""
    config = model_config(store, expansion)
    family = family_of(config)
    names = family.block_tensors(config)
    return frozenset(
        family.block_tensor(b.index, n) for b in read_expansion(store, expansion).new_blocks for n in names
    )


def train_only(model: Any, new_names: frozenset[str], rates: LearningRates) -> tuple[list[Group], Frozen]:  # noqa: ANN401
    """Freeze all but the groups with a rate above 0; returns the groups and the digests of what is frozen."""
    if rates.new_blocks == 0.0:
        raise BadInput("train.learning_rates.new_blocks is 0, so no storey would be trained; set it above 0")
    parameters = dict(model.named_parameters())
    groups = [Group("new_blocks", rates.new_blocks, {n: parameters[n] for n in sorted(new_names)})]
    if rates.base > 0.0:
        groups.append(Group("base", rates.base, {n: p for n, p in parameters.items() if n not in new_names}))
    frozen = freeze_except(model, {name for group in groups for name in group.parameters})
    # With a base that trains, buffers alone would be left, and a frozen base is not to be claimed of them.
    return groups, Frozen({} if rates.base > 0.0 else digest_tensors(model, frozen))


def announcement(
    model: Any,  # noqa: ANN401 - a transformers model
    blocks: Sequence[NewBlock],
    groups: list[Group],
    data: Data,
    train: Train,
) -> str:
    """One line: which blocks train, how many parameters, the memory expected."""
    copies = ", ".join(f"{block.index} (copy of {block.source})" for block in blocks)
    count = {group.name: sum(p.numel() for p in group.parameters.values()) for group in groups}
    total = sum(p.numel() for p in model.parameters())
    gib = expected_bytes(model, groups, train.batch_sequences, data.sequence_tokens) / 2**30
    what = " and ".join(f"{name} {parameters:,}" for name, parameters in count.items())
    base = "the base trains too and is not frozen" if "base" in count else "the base is frozen"
    return (
        f"new blocks {copies}; parameters that train: {what} of {total:,}; {base}; "
        f"compute {train.precision}; expected memory {gib:.2f} GiB, libraries not counted"
    )
