"""The training of the inserted blocks, and the text in the form that it reads."""

import json
from dataclasses import dataclass, replace
from typing import Any

from mansard.errors import BadInput
from mansard.launch import Request
from mansard.models.tokenizer_files import take_tokenizer
from mansard.records import Derivation, SnapshotId
from mansard.site import Site
from mansard.specs import Data, Train
from tasks import policy
from tasks.derivation import Asked, Work, derive_many, derive_one
from tasks.snapshots import TakenData


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """One part (`train` or `held_out`) of one source, tokenized."""

    source: str
    part: str
    made: Derivation

    @property
    def input_name(self) -> str:
        return f"data.{self.source}.{self.part}"


@policy.derivation
def tokenize(work: Work, model: SnapshotId, data: tuple[TakenData, ...], mixture: Data) -> tuple[TokenizedText, ...]:
    """Every text as shards of packed rows; one process makes those that no model with this tokenizer had made."""
    tokenizer = take_tokenizer(work.store, model)
    parts = [(d.name, part, text) for d in data for part, text in (("train", d.train), ("held_out", d.held_out))]
    spec = {"sequence_tokens": mixture.sequence_tokens, "seed": mixture.seed}
    asked = []
    for source, part, text in parts:
        name = f"data.{source}.{part}"
        request = Request("tokenize", {"tokenizer": tokenizer, name: text}, spec)
        asked.append(Asked(request, f"tokenize {source} {part}", frozenset({name})))
    made = derive_many(work, asked)
    return tuple(TokenizedText(source, part, one) for (source, part, _), one in zip(parts, made, strict=True))


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
