"""The real vLLM serves users and gives the states of prompts that ask: the states are the model's, also where the
prefix cache answered, and users get the very answers that an engine without any of this gives them.
"""

import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest

from mansard.evaluation.engine_api import post_json

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TAPS = [1, 2]
FIRST_PORT = 8300
TOLERANCE = 1e-5
"""Relative distance of a prompt's fp32 states, engine against transformers: 1.9e-6 measured, bf16 rounds by 2e-3."""
CONNECTOR = {
    "kv_connector": "StatesConnector",
    "kv_connector_module_path": "mansard_vllm.connector",
    "kv_role": "kv_producer",
    "kv_connector_extra_config": {"port": FIRST_PORT},
}
TOKENS = 16


def prompts() -> list[list[int]]:
    """Pairs share a beginning longer than a block of the cache, and none fits into one step's budget."""
    import torch

    generator = torch.Generator().manual_seed(7)

    def some(count: int) -> list[int]:
        return torch.randint(3, 512, (count,), generator=generator).tolist()

    starts = [some(280), some(300)]
    return [start + some(40 + 30 * number) for start in starts for number in range(3)]


def answer(endpoint: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    """A user's greedy tokens and their log-probabilities."""
    body = {"model": "base", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
    found = post_json(endpoint, "/v1/completions", {**body, "logprobs": 1, "return_token_ids": True})
    assert not found.get("kv_transfer_params"), "nothing is given to those who do not ask"
    choice = found["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def cached_tokens(endpoint: str) -> float:
    with urllib.request.urlopen(f"{endpoint}/metrics") as response:
        found = re.search(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", response.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def distance(found: Any, wanted: Any) -> float:
    return float((found - wanted).norm() / wanted.norm())


def states_of(model: Any, prompt: list[int]) -> list[Any]:
    """The final state, then the taps, as transformers computes them, [tokens, D] each."""
    import torch

    with torch.no_grad():
        given = model.model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
    return [given.last_hidden_state[0], *(given.hidden_states[tap][0] for tap in TAPS)]


def test_states_are_the_models_and_users_answers_are_untouched(tmp_path: Path) -> None:
    import torch

    from mansard.carry_on.same_quantization import quantization_of
    from mansard.carry_on.sequences import TokenSequence, key_of
    from mansard.carry_on.serving_node import ServingNode
    from mansard.composition.tapping import serving_config
    from mansard.models.loading import load_model
    from mansard.models.model_files import model_config
    from tests.benchmarks.bench_carry_on import engine, make_base

    store, base, tree = make_base(tmp_path)
    model = load_model(tree, torch.float32)
    asked = prompts()
    # On a core that is named: left to itself, vLLM computes on more threads where there is a connector.
    with engine(tmp_path, tree, [], cores="0") as endpoint:
        plain = [answer(endpoint, prompt) for prompt in asked]
    overrides = f"--hf-overrides={json.dumps(serving_config(store, base, TAPS))}"
    connector = f"--kv-transfer-config={json.dumps(CONNECTOR)}"
    with engine(tmp_path, tree, [overrides, connector], cores="0") as endpoint:
        assert [answer(endpoint, prompt) for prompt in asked] == plain  # the tokens, and the numbers bit for bit
        node = ServingNode(endpoint, "base")
        node.check(base, max(map(len, asked)))
        assert node.told_quantization() == quantization_of(model_config(store, base)) == "none"
        sequences = [TokenSequence(key_of(t), t) for t in (numpy.array(p, dtype=numpy.int32) for p in asked)]
        before = cached_tokens(endpoint)
        with ThreadPoolExecutor(2 * len(asked)) as pool:  # users all the while, in the same batches
            users = [pool.submit(answer, endpoint, prompt) for prompt in asked]
            found = list(pool.map(node.states_as_served, sequences))
        assert [user.result()[0] for user in users] == [tokens for tokens, _ in plain]
        assert cached_tokens(endpoint) > before
        unseen = numpy.array(asked[0][::-1], dtype=numpy.int32)
        (fresh,) = node.states([TokenSequence(key_of(unseen), unseen)])
    for prompt, states in zip(asked, found, strict=True):
        assert states.dtype == torch.float32
        parts = zip(states.chunk(1 + len(TAPS), dim=-1), states_of(model, prompt), strict=True)
        assert max(distance(part, wanted) for part, wanted in parts) < TOLERANCE
    wanted = torch.cat(states_of(model, unseen.tolist()), dim=-1)
    assert distance(fresh.float(), wanted) < 0.005 and fresh.dtype == torch.bfloat16
