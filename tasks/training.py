"""The training of the inserted blocks, and the text in the form that it reads."""

import json
from dataclasses import dataclass, replace
from typing import Any

from mansard.errors import BadInput
from mansard.launch import Request
from mansard.models.tokenizer_files import take_tokenizer
from mansard.records import Derivation, SnapshotId
from mansard.site import Site
from mansard.specs.data import Data
from mansard.specs.training import Train
from mansard.store.store import Store
from tasks import policy
from tasks.derivation import Asked, Work, derive_many, derive_one
from tasks.snapshots import TakenData


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """One part (`train` or `held_out`) of one source, tokenized; it is the input data.SOURCE.PART of a training."""

    input_name: str
    made: Derivation


@policy.derivation
def tokenize(work: Work, model: SnapshotId, data: tuple[TakenData, ...], mixture: Data) -> tuple[TokenizedText, ...]:
    """Every text as shards of packed rows; one process makes those that no model with this tokenizer had made."""
    asked = tokenize_asked(work.store, model, data, mixture)
    made = derive_many(work, list(asked.values()))
    return tuple(TokenizedText(name, one) for name, one in zip(asked, made, strict=True))


def tokenize_asked(store: Store, model: SnapshotId, data: tuple[TakenData, ...], mixture: Data) -> dict[str, Asked]:
    """By the input's name, data.SOURCE.PART. Nothing in it depends on the model's weights or depth."""
    tokenizer = take_tokenizer(store, model)
    spec = {"sequence_tokens": mixture.sequence_tokens, "seed": mixture.seed}
    asked = {}
    for source in data:
        for part, text in (("train", source.train), ("held_out", source.held_out)):
            name = f"data.{source.name}.{part}"
            request = Request("tokenize", {"tokenizer": tokenizer, name: text}, spec)
            asked[name] = Asked(request, f"tokenize {source.name} {part}", frozenset({name}))
    return asked


@policy.derivation
def train(
    work: Work, expansion: SnapshotId, texts: tuple[TokenizedText, ...], mixture: Data, spec: Train
) -> Derivation:
    """The trained tensors. A killed one goes on from its checkpoint when it is asked for again."""
    files = {text.input_name: text.made.snapshot for text in texts}
    request = Request(
        "train",
        {"expansion": expansion, **files},
        {"data": mixture.model_dump(mode="json"), "train": spec.model_dump(mode="json")},
    )
    request = replace(request, where=ranks_of(work.site))
    return derive_one(work, Asked(request, "train", frozenset(files)))


def ranks_of(site: Site) -> dict[str, Any]:
    """How the stage runs in several processes, where the site says so. It changes no recipe: a run of another number
    of processes goes on from the same checkpoint, and its result is the same but for rounding."""
    training = site.training
    if training.processes == 1:
        return {}
    assert training.deepspeed is not None, "load_site has checked it"
    try:
        config = json.loads(training.deepspeed.read_bytes())
    except (OSError, ValueError) as error:
        where = f"{training.deepspeed}: not a DeepSpeed configuration"
        raise BadInput(f"{where} ({error}); configs/deepspeed has some") from error
    return {
        "ranks": {
            "processes": training.processes,
            "config": config,
            "hang_seconds": float(training.hang_seconds),
            "launcher": list(training.launcher),
        }
    }
