"""Bases that one branch may read together: they must cut text into the same tokens. No torch."""

import json
from collections.abc import Mapping, Sequence

from mansard.canonical import canonical_json
from mansard.composition.description import BranchDescription
from mansard.digest import digest_bytes
from mansard.errors import BadInput
from mansard.models.vocabulary import TOKENIZER_FILE
from mansard.records import SnapshotId
from mansard.store.store import Store

OF_USE_ONLY = ("padding", "truncation")
"""Of tokenizer.json: how it was last called, not what it does."""


def check_tokenizers(store: Store, bases: Sequence[SnapshotId]) -> None:
    """BadInput where a base's tokenizer is not the first one's: their states would be of different tokens."""
    digests = [tokenizer_digest(store, base) for base in bases]
    for base, digest in zip(bases[1:], digests[1:], strict=True):
        if digest != digests[0]:
            raise BadInput(
                f"base {base[:12]} has tokenizer {digest[:12]}, the first base {bases[0][:12]} has {digests[0][:12]}: "
                "a branch reads several bases' states of the same tokens; take bases of one tokenizer"
            )


def tokenizer_digest(store: Store, base: SnapshotId) -> str:
    """Of what tokenizer.json does; BadInput where there is none."""
    if TOKENIZER_FILE not in store.manifest(base).files:
        raise BadInput(f"base {base[:12]}: no {TOKENIZER_FILE}; bases of a mixture are compared by it")
    value = json.loads(store.read_file(base, TOKENIZER_FILE))
    return digest_bytes(canonical_json({key: part for key, part in value.items() if key not in OF_USE_ONLY}))


def others_of(inputs: Mapping[str, SnapshotId]) -> list[tuple[SnapshotId, SnapshotId]]:
    """(artifact, capture) of the bases beside the first: `artifact.1`, `capture.1`, `artifact.2` ... of a stage."""
    found: list[tuple[SnapshotId, SnapshotId]] = []
    while (number := len(found) + 1) and f"artifact.{number}" in inputs:
        found.append((inputs[f"artifact.{number}"], inputs[f"capture.{number}"]))
    return found


def check_others(description: BranchDescription, others: Sequence[SnapshotId], where: str) -> None:
    """BadInput where the bases beside the first are not those that the branch was trained with, in their order."""
    if description.others != tuple(others):
        wanted, given = (", ".join(b[:12] for b in bases) or "none" for bases in (description.others, others))
        raise BadInput(f"{where}: this branch reads these bases beside the first: {wanted}; given: {given}")
