"""Which tensors train, which are frozen, and what is said of it before the first step.

New tensors are named exactly, by the family's adapter, never by a substring that an original block shares.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from mansard.errors import BadInput, StageFailed
from mansard.models.families import Config, Slot, depth_of, family_of
from mansard.models.freeze import compare, digest_tensors, freeze_except
from mansard.models.model_files import model_config
from mansard.models.storeys import NewBlock, newest_tensors
from mansard.records import SnapshotId
from mansard.specs.training import LearningRates, Train
from mansard.store.store import Store
from mansard.training.frozen_linear import require_fp8
from mansard.training.linear_product import shorten
from mansard.training.optimizer import Group
from mansard.training.quantized_blocks import quantize_linears

POST_NORM_FACTOR = 30.0
"""Rate of Gemma's post-norms over that of their blocks: a scale starts at 0 and must reach the order of 1. Measured
2026-11-22 on four random blocks of width 64 trained on text, two inserted, 200 steps of 2e-4: held-out loss falls by
0.01 with factor 1, 0.06 with 10, 0.11 with 30 (Gemma-3; Gemma-2 alike, bf16 alike), beside 0.13 of a Qwen3."""

GENTLE_BASE_RATE = 1e-6
"""Above it a base that trains is warned of (the seed article's bound)."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """Digests of the frozen tensors as they stood in memory."""

    digests: Mapping[str, str]

    def check(self, found: Mapping[str, str]) -> None:
        """StageFailed names the tensors that are no longer what they were."""
        changed = compare(self.digests, found)
        if changed:
            raise StageFailed(
                f"{len(changed)} frozen tensors changed during training, e.g. {', '.join(changed[:3])}; "
                "nothing of this run was kept"
            )


@dataclass(frozen=True, slots=True)
class Names:
    """The checkpoint's tensors: where transformers holds each, which are the newest storey's, and of those which are
    post-norms that start at a scale of 0, and which silence their block; `linears`: name -> name in its block."""

    slots: Mapping[str, Slot]
    new: frozenset[str]
    post_norms: frozenset[str]
    silent: frozenset[str]
    linears: Mapping[str, str]

    def parameters(self, names: Set[str]) -> list[str]:
        """The parameters that hold these tensors."""
        return sorted({self.slots[name].parameter for name in names})


def checkpoint_names(store: Store, expansion: SnapshotId) -> Names:
    return names_in(model_config(store, expansion), newest_tensors(store, expansion))


def names_in(config: Config, newest: Iterable[str]) -> Names:
    """Of a model with this config.json, whose newest storey's tensors are given."""
    family = family_of(config)
    blocks = range(depth_of(config))
    every = [*family.outer_tensors(config)]
    every += [family.block_tensor(b, n) for b in blocks for n in family.block_tensors(config, b)]
    new = frozenset(newest)
    places = {name: place for name in new if (place := family.split(name)) is not None}
    silent = {n: value for n, (_, inner) in places.items() if (value := family.silent_value(inner)) is not None}
    linears = {n: inner for n, (b, inner) in places.items() if len(family.block_shapes(config, b)[inner]) == 2}
    return Names(
        {name: family.slot(name) for name in every},
        new,
        frozenset(name for name, value in silent.items() if value != 0.0),
        frozenset(silent),
        {n.removesuffix(".weight"): inner.removesuffix(".weight") for n, inner in linears.items()},
    )


def train_only(
    model: Any,  # noqa: ANN401 - a transformers model
    names: Names,
    rates: LearningRates,
    frozen: str | None = None,
    new_blocks: str | None = None,
) -> tuple[list[Group], Frozen]:
    """Freeze all but the groups with a rate above 0, `frozen` and `new_blocks` as in `specs.Train`; returns the groups
    and the digests of what is frozen, as it stands in memory."""
    parameters = dict(model.named_parameters())
    new = names.parameters(names.new)
    groups = groups_of({n: parameters[n] for n in new}, names, rates)
    if rates.base > 0.0:
        groups.append(Group("base", rates.base, {n: p for n, p in parameters.items() if n not in new}))
    trained = {name for group in groups for name in group.parameters}
    still = freeze_except(model, trained)
    if frozen == "fp8":
        require_fp8(model.device)
        quantize_linears(model.get_decoder().layers, new_blocks == "fp8")
        still = freeze_except(model, trained)
    elif model.dtype == torch.float32:
        shorten(model.get_decoder().layers, frozen == "bf16", new_blocks == "bf16")
    # With a base that trains, buffers alone would be left, and a frozen base is not to be claimed of them.
    return groups, Frozen({} if rates.base > 0.0 else digest_tensors(model, still))


def groups_of(trained: Mapping[str, Any], names: Names, rates: LearningRates) -> list[Group]:
    """The new blocks' parameters in groups: their post-norms have a rate of their own. BadInput for rates that fit no
    new block."""
    if rates.new_blocks == 0.0:
        raise BadInput("train.learning_rates.new_blocks is 0, so no storey would be trained; set it above 0")
    if rates.post_norms is not None and not names.post_norms:
        raise BadInput("train.learning_rates.post_norms: this family's new blocks have none; remove the key")
    post_norms = names.parameters(names.post_norms)
    groups = [Group("new_blocks", rates.new_blocks, {n: p for n, p in trained.items() if n not in post_norms})]
    if post_norms:
        rate = rates.post_norms or POST_NORM_FACTOR * rates.new_blocks
        groups.append(Group("post_norms", rate, {n: trained[n] for n in post_norms}))
    return groups


def announcement(
    model: Any,  # noqa: ANN401 - a transformers model
    blocks: Sequence[NewBlock],
    groups: list[Group],
    train: Train,
) -> str:
    """One line: which blocks train, how many parameters, in which types."""
    copies = ", ".join(f"{block.index} (copy of {block.source})" for block in blocks)
    count = {group.name: sum(p.numel() for p in group.parameters.values()) for group in groups}
    total = sum(p.numel() for p in model.parameters()) + sum(
        getattr(module, "quantized_values", 0) for module in model.modules()
    )
    what = " and ".join(f"{name} {parameters:,}" for name, parameters in count.items())
    kept: str = "fp8" if train.frozen == "fp8" else train.precision
    if train.adapter is not None and train.adapter.method == "qlora":
        kept = "4 bits"
    base = f"the base is frozen, in {kept}"
    if "base" in count:
        base = "the base trains too and is not frozen"
        if train.learning_rates.base > GENTLE_BASE_RATE:
            base += f" (warning: at a rate of {train.learning_rates.base:g}, above {GENTLE_BASE_RATE:g}, it forgets)"
    if train.anchor is not None:
        base += f"; anchored to it on general text by {train.anchor.kind}, weight {train.anchor.weight:g}"
    computing: str = train.precision
    if train.precision == "fp32" and set(train.products.values()) != {"fp32"}:
        frozen, new = train.products.values()
        computing += f" with products of frozen linears in {frozen}, of those that train in {new}"
    return f"new blocks {copies}; parameters that train: {what} of {total:,}; {base}; compute {computing}"
