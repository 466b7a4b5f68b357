"""A Qwen3 goes the whole way: taken, expanded, proved, trained, fused, quantized, served by vLLM, evaluated.

Every stage in its worker process, as an upgrade runs it; one engine start. (The story's model is a Llama.)
"""

import asyncio
import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mansard.evaluation.engine_api import post_json
from mansard.evaluation.item_records import bits_record
from mansard.evaluation.prompt_logprobs import continuation_scores, question
from mansard.evaluation.suites import take_suite
from mansard.launch import Request, derive
from mansard.models.model_files import model_config
from mansard.models.tokenizer_files import take_tokenizer
from mansard.serving.engine.engine import Engine, EngineIdentity
from mansard.site import Site, load_site
from mansard.specs.judging import Suite
from mansard.specs.surgery import Quantize
from mansard.specs.whole import Serve
from mansard.store.store import Store
from mansard.worker_start import fork_servers
from tests.end_to_end.conftest import ROOT, write_site

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SERVE = Serve(max_model_len=256)
SUITE = Suite(format=1, name="words-bits", kind="bits_per_byte", items="items.jsonl")
ROW_TOKENS = 32


def texts(seed: int, documents: int) -> list[str]:
    words = ["storey", "house", "roof", "slate", "beam", "attic", "gable", "dormer"]
    return [" ".join(words[(i * 5 + j * (seed + 3)) % 8] for j in range(30)) + f" {i}." for i in range(documents)]


def lines(documents: list[str]) -> bytes:
    rows = [{"text": text, "file": f"{i}.txt", "id": str(i)} for i, text in enumerate(documents)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_base(folder: Path) -> Path:
    """Two blocks of random numbers, tied, with norms on queries and keys that are not all one."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from mansard.demo.base import train_tokenizer

    config = Qwen3Config(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=1, max_window_layers=2, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    train_tokenizer(texts(0, 20), 320, 256).save_pretrained(folder)
    return folder


def train_slice() -> dict[str, Any]:
    source = {"name": "words", "train": "t", "held_out": "h", "weight": 1.0, "is_domain": True}
    return {
        "data": {"sources": [source], "sequence_tokens": ROW_TOKENS, "min_domain_fraction": 0.3, "seed": 0},
        "train": {
            "tokens": 30 * 4 * ROW_TOKENS, "batch_sequences": 4, "learning_rates": {"new_blocks": 4e-3, "base": 0.0}
        },
    }  # fmt: skip


def harness_bits(endpoint: str, prompts: list[list[int]]) -> list[float]:
    """Bits of each prompt but its first token, asked as lm-evaluation-harness itself asks."""
    body = {"model": "qwen", "prompt": prompts, "max_tokens": 1, "temperature": 0, "seed": 0}
    choices = post_json(endpoint, "/v1/completions", {**body, "logprobs": 1, "echo": True})["choices"]
    sums = [sum(c["logprobs"]["token_logprobs"][1:-1]) for c in sorted(choices, key=lambda c: int(c["index"]))]
    return [float(bits_record("", "", loglikelihood, 1)["bits"]) for loglikelihood in sums]


def check_both_forms(endpoint: str, prompts: list[list[int]]) -> None:
    """The plugin's bytes hold the very numbers of vLLM's own JSON, alternatives too."""
    for alternatives in (0, 1):
        body = question("qwen", prompts, alternatives, 0)
        compact = post_json(endpoint, "/v1/completions", body)
        plain = post_json(endpoint, "/v1/completions", {**body, "vllm_xargs": {}})
        assert all(c["prompt_logprobs"] is None and c["mansard_prompt_logprobs"] for c in compact["choices"])
        assert all("mansard_prompt_logprobs" not in c for c in plain["choices"])
        for context in (1, 9):
            lengths = [context] * len(prompts)
            scores = continuation_scores(compact, prompts, lengths)
            assert scores == continuation_scores(plain, prompts, lengths) and len(scores) == len(prompts)


async def answered(
    site: Site, store: Store, artifact: str, suite: str, prompts: list[list[int]]
) -> tuple[str, list[float], dict[str, Any]]:
    """Item records, `prompts` in the harness's own way, and a completion, of the artifact through its engine."""
    async with aiohttp.ClientSession() as session:
        engine = Engine(EngineIdentity(artifact, "qwen", SERVE), site, session)
        with store.using(artifact) as tree:
            try:
                await engine.start(tree, tuple)
                assert vllm_processes(engine.pid) == ["VLLM::EngineCor"], "it computes beside the API server, no other"
                where = {"endpoint": engine.endpoint, "served_name": "qwen"}
                slices = {
                    "suite": SUITE.model_dump(mode="json"), "serve": SERVE.model_dump(mode="json"), "engine": {}
                }  # fmt: skip
                request = Request("evaluate", {"artifact": artifact, "suite": suite}, slices, where)
                records = await asyncio.to_thread(derive, store, site, request)
                bits = await asyncio.to_thread(harness_bits, engine.endpoint, prompts)
                await asyncio.to_thread(check_both_forms, engine.endpoint, prompts)
                body = {"model": "qwen", "prompt": "storey house", "max_tokens": 8, "temperature": 0.0}
                completion = await asyncio.to_thread(post_json, engine.endpoint, "/v1/completions", body)
            finally:
                await engine.stop()
    return records.snapshot, bits, completion


def vllm_processes(session: int) -> list[str]:
    """The names of the processes that vLLM started in an engine's session, as far as Linux keeps them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            name = (folder / "comm").read_text().strip()
            if name.startswith("VLLM::") and os.getsid(int(folder.name)) == session:
                found.append(name)
    return found


def opened_tokens(tree: Path, documents: list[str]) -> list[list[int]]:
    from mansard.models.loading import load_tokenizer

    tokenizer = load_tokenizer(tree)
    return [[tokenizer.bos_token_id, *tokenizer(d, add_special_tokens=False)["input_ids"]] for d in documents]


def bits_in_memory(tree: Path, documents: list[str]) -> list[float]:
    """Bits of each text, the opening token given, by transformers' own Qwen3 of the same files."""
    import torch
    from torch.nn.functional import cross_entropy

    from mansard.models.loading import load_model

    model = load_model(tree, torch.bfloat16)
    found = []
    for ids in opened_tokens(tree, documents):
        with torch.inference_mode():
            logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        found.append(float(cross_entropy(logits_TV, torch.tensor(ids[1:]), reduction="sum")) / math.log(2))
    return found


def made(store: Store, site: Site, stage: str, inputs: Mapping[str, str], spec: Mapping[str, Any]) -> str:
    return derive(store, site, Request(stage, inputs, spec)).snapshot


def test_a_qwen3_is_upgraded_and_answers_through_vllm_as_its_files_say(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    site = load_site(write_site(tmp_path))
    with fork_servers(site):
        upgraded_and_answers(site, tmp_path)


def upgraded_and_answers(site: Site, folder: Path) -> None:
    store = Store(site.store)
    base = store.snapshot(write_base(folder / "base"))
    data = store.put_files({"data.jsonl": lines(texts(1, 80))})
    expansion = made(store, site, "expand", {"model": base}, {"blocks": 2, "positions": "even"})
    probe = {"probe_tokens": 32, "seed": 0}
    for form in ("logits", "structure"):
        proof = made(store, site, "prove", {"base": base, "expansion": expansion}, {**probe, "form": form})
        assert json.loads(store.read_file(proof, "proof.json"))["equal"] is True
    files = {"data.words.train": data, "data.words.held_out": store.put_files({"data.jsonl": lines(texts(1, 20))})}
    rows = {"sequence_tokens": ROW_TOKENS, "seed": 0}
    tokenizer = take_tokenizer(store, base)
    files = {n: made(store, site, "tokenize", {"tokenizer": tokenizer, n: text}, rows) for n, text in files.items()}
    trained = made(store, site, "train", {"expansion": expansion, **files}, train_slice())
    curve = json.loads(store.read_file(trained, "training.json"))["curve"]
    assert curve[-1]["bits_per_byte"]["words"] < curve[0]["bits_per_byte"]["words"]
    fused = made(store, site, "fuse", {"expansion": expansion, "trained": trained}, {"method": "residual"})
    awq = Quantize(group_size=64, source="words", samples=16, sample_tokens=32)
    artifact = made(store, site, "quantize", {"model": fused, "data": data}, awq.model_dump(mode="json"))
    config = model_config(store, artifact)
    assert (config["architectures"], config["num_hidden_layers"]) == (["Qwen3ForCausalLM"], 4)
    assert config["layer_types"] == ["full_attention"] * 4 and config["max_window_layers"] == 4

    documents = texts(1, 12)
    (site.data / "items.jsonl").parent.mkdir(parents=True, exist_ok=True)
    (site.data / "items.jsonl").write_bytes(lines(documents))
    suite = take_suite(store, SUITE, site.data)
    prompts = opened_tokens(store.materialize(artifact), documents)
    records, harness, completion = asyncio.run(answered(site, store, artifact, suite, prompts))
    assert completion["usage"]["completion_tokens"] >= 1
    told = [json.loads(line) for line in store.read_file(records, "records.jsonl").splitlines()]
    assert [r["id"] for r in told] == [str(i) for i in range(12)]
    assert [r["bits"] for r in told] == harness, "asking for less changes no number"
    expected = bits_in_memory(store.materialize(artifact), documents)
    assert [r["bits"] for r in told] == pytest.approx(expected, rel=0.02)
    untrained = bits_in_memory(store.materialize(base), documents)
    assert sum(r["bits"] for r in told) < 0.9 * sum(untrained)
