"""Which tensors train, which are frozen, and what is said of it before the first step.

New blocks are named exactly (`model.layers.INDEX.` with the dots), never by a substring that an original block shares.
Families that name their blocks otherwise come with their adapters.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mansard.errors import BadInput, StageFailed
from mansard.models.freeze import compare, digest_tensors, freeze_except
from mansard.specs import Data, Train
from mansard.training.memory import expected_bytes
from mansard.training.optimizer import Group


@dataclass(frozen=True, slots=True)
class NewBlock:
    """An inserted block and the block it was copied from, both 0-based (the source in the base's numbering)."""

    index: int
    source: int


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


def read_new_blocks(expansion: Path) -> list[NewBlock]:
    """What the expansion inserted, in order."""
    record = json.loads((expansion / "mansard_expansion.json").read_text())
    blocks = [NewBlock(block["index"], block["source"]) for block in record["new_blocks"]]
    if not blocks:
        raise BadInput("the expansion inserted no block, so there is nothing to train; raise expand.blocks")
    return sorted(blocks, key=lambda block: block.index)


def train_only(model: Any, blocks: list[NewBlock], train: Train) -> tuple[list[Group], Frozen]:  # noqa: ANN401
    """Freeze all but the groups with a rate above 0; returns the groups and the digests of what is frozen."""
    parameters = dict(model.named_parameters())
    prefixes = tuple(f"model.layers.{block.index}." for block in blocks)
    new = {name: p for name, p in parameters.items() if name.startswith(prefixes)}
    assert len({name.split(".")[2] for name in new}) == len(blocks), "every new block has parameters of its name"
    base = {name: p for name, p in parameters.items() if name not in new}
    rates = train.learning_rates
    groups = [
        Group(name, rate, chosen)
        for name, rate, chosen in (("new_blocks", rates.new_blocks, new), ("base", rates.base, base))
        if rate > 0.0
    ]
    if not groups:
        raise BadInput("train.learning_rates are all 0, so nothing would train; set new_blocks above 0")
    frozen = freeze_except(model, {name for group in groups for name in group.parameters})
    return groups, Frozen(digest_tensors(model, frozen))


def announcement(
    model: Any,  # noqa: ANN401 - a transformers model
    blocks: list[NewBlock],
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
        f"compute {train.precision}; expected memory {gib:.2f} GiB"
    )
