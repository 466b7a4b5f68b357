"""The demo's base: the same files every time, a tokenizer that starts with BOS, a model any loader takes."""

import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mansard.demo import corpus_stage
from mansard.digest import digest_file
from mansard.errors import BadInput
from mansard.store.store import Store
from mansard.worker import Channel, StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = [f"def function_{i}(x):\n    return x + {i}  # naïve → dash\n" for i in range(200)]
SHAPE = {"vocabulary": 320, "hidden": 32, "intermediate": 64, "blocks": 2, "heads": 2, "max_tokens": 64}


@pytest.fixture(scope="module")
def tokenizer() -> "PreTrainedTokenizerFast":
    from mansard.demo.base import train_tokenizer

    return train_tokenizer(TEXTS, SHAPE["vocabulary"], SHAPE["max_tokens"])


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "file": f"{i}.py"}) + "\n" for i, text in enumerate(texts)).encode()


@pytest.mark.slow
def test_any_text_survives_the_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> None:
    text = "  tabs\tand\nümlauts, → arrows, \u2028 and 漢字\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == SHAPE["vocabulary"]


@pytest.mark.slow
def test_the_same_text_makes_the_same_files(tmp_path: Path) -> None:
    from mansard.demo.base import save_base, train_tokenizer, untrained_model

    for name in ("one", "other"):
        tokenizer = train_tokenizer(TEXTS, SHAPE["vocabulary"], SHAPE["max_tokens"])
        save_base(untrained_model(SHAPE, 0), tokenizer, tmp_path / name)
    digests = [{p.name: digest_file(p) for p in (tmp_path / name).iterdir()} for name in ("one", "other")]
    assert digests[0] == digests[1]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= digests[0].keys()


@pytest.mark.slow
def test_the_base_is_trained_and_loads_as_a_plain_checkpoint(store: Store) -> None:
    import torch

    from mansard.demo import pretrain_stage
    from mansard.models.loading import load_model, load_tokenizer

    files = {f"{d}.{part}.jsonl": jsonl(TEXTS) for d in ("docstrings", "code") for part in ("train", "held-out")}
    train = {
        "tokens": 20 * 4 * 32, "batch_sequences": 4, "learning_rates": {"new_blocks": 0.0, "base": 1e-2},
        "precision": "fp32", "evaluate_every_steps": 10, "checkpoint_every_steps": 10,
    }  # fmt: skip
    spec = {"format": 1, "model": SHAPE, "sequence_tokens": 32, "train": train}
    with Path(os.devnull).open("w") as nowhere:
        context = StageContext(
            store, "b" * 64, {"corpus": store.put_files(files)}, spec, {}, store.work("b" * 64), Channel(nowhere)
        )
        folder = store.materialize(pretrain_stage.run(context))
    model, tokenizer = load_model(folder, None), load_tokenizer(folder)
    assert model.dtype == torch.bfloat16
    assert tokenizer.eos_token_id == model.config.eos_token_id == 1
    ids = torch.tensor([tokenizer(TEXTS[7])["input_ids"]])
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 3.0  # an untrained model of 320 tokens stands at 5.8


def test_another_python_than_the_recipe_names_is_refused(store: Store) -> None:
    spec = {"format": 1, "python": "2.7.18"}
    with Path(os.devnull).open("w") as nowhere:
        context = StageContext(store, "c" * 64, {}, spec, {}, store.work("c" * 64), Channel(nowhere))
        version = platform.python_version()
        with pytest.raises(BadInput, match=rf"python '2\.7\.18': this stage's interpreter is {version}"):
            corpus_stage.run(context)
