"""States from nodes that serve users, told apart from pooling nodes by the site, and held to the same checks."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml

from mansard.errors import BadInput, StageFailed
from mansard.site import load_site
from mansard.site_sections import InferenceNode
from mansard.worker import Channel, StageContext
from tests.mansard.carry_on.conftest import DATA, ROWS, SERVE, Filled, ServeStates, StatesServer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]


def listed(server: StatesServer, kind: str, quantization: str | None = None) -> dict[str, Any]:
    return asdict(InferenceNode(server.endpoint, "base", kind, quantization))


def capture(filled: Filled, nodes: list[dict[str, Any]], work: Path, taps: list[int]) -> str:
    from mansard.carry_on.capture_stage import run

    spec = {"data": DATA, "scheme": "bf16", "rows": ROWS, "serve": SERVE, "engine": {}, "taps": taps}
    work.mkdir()
    channel = Channel(io.StringIO())
    return run(StageContext(filled.store, "0" * 64, filled.inputs, spec, {"nodes": nodes}, work, channel))


def sequence(tokens: int) -> Any:
    from mansard.carry_on.sequences import TokenSequence, key_of

    numbers = numpy.arange(3, 3 + tokens, dtype=numpy.int32)
    return TokenSequence(key_of(numbers), numbers)


def node(server: StatesServer) -> Any:
    from mansard.carry_on.serving_node import node_of

    return node_of(listed(server, "serving"))


@pytest.mark.parametrize("taps", [[], [1]])
def test_a_capture_is_the_same_from_pooling_and_from_serving_nodes(
    filled: Filled, serve_states: ServeStates, tmp_path: Path, taps: list[int]
) -> None:
    pooling, serving = serve_states(taps=tuple(taps)), serve_states(taps=tuple(taps))
    dying = serve_states(taps=tuple(taps), dies_after=1)
    wanted = capture(filled, [listed(pooling, "pooling")], tmp_path / "a", taps)
    found = capture(filled, [listed(serving, "serving"), listed(dying, "serving")], tmp_path / "b", taps)
    assert found == wanted  # snapshots name their bytes
    assert dying.asked == [1], "the probe"
    assert not serving.waiting


def test_nodes_of_both_kinds_must_agree(filled: Filled, serve_states: ServeStates, tmp_path: Path) -> None:
    from mansard.carry_on.nodes import check_agreement

    right, wrong = serve_states(), serve_states(scale=1.2)
    with pytest.raises(BadInput, match="the same base in the same quantization"):
        check_agreement([node(right), node(wrong)], sequence(9))


def test_taps_that_a_serving_node_lacks_are_told_with_the_words_to_start_it(
    filled: Filled, serve_states: ServeStates, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r'"CarryOnStatesLlamaForCausalLM"\], "carry_on_taps": \[1\]'):
        capture(filled, [listed(serve_states(), "serving")], tmp_path / "a", [1])


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"gives_states": False}, "no states beside the answer; start the engine with architectures CarryOnStates"),
        ({"lost_tokens": 1}, "states of 8 tokens, the sequence has 9"),
        ({"lost_bytes": 2}, "the answer was cut"),
    ],
)
def test_an_answer_without_every_state_fails_the_node(
    serve_states: ServeStates, broken: dict[str, Any], words: str
) -> None:
    from mansard.carry_on.nodes import NodeFailed

    server = serve_states()
    for name, value in broken.items():
        setattr(server, name, value)
    with pytest.raises(NodeFailed, match=words):
        node(server).states([sequence(9)])


def test_states_that_are_not_finite_end_a_capture_whose_only_node_gives_them(
    filled: Filled, serve_states: ServeStates, tmp_path: Path
) -> None:
    with pytest.raises(StageFailed, match="not finite"):
        capture(filled, [listed(serve_states(scale=float("nan")), "serving")], tmp_path / "a", [])


def test_a_serving_node_needs_room_for_the_token_that_it_answers(serve_states: ServeStates) -> None:
    server = serve_states()
    node(server).check("a" * 64, 127)
    with pytest.raises(BadInput, match="takes 128 tokens, the longest sequence has 128 and 1 that the node answers"):
        node(server).check("a" * 64, 128)


@pytest.mark.parametrize(
    ("told", "stated", "words"),
    [
        ("awq", "none", "serves quantization awq, the site says none; start the node on the base's artifact"),
        ("awq", None, "serves quantization awq, the base has none; start the node on the base's artifact"),
        ("awq", "awq", "serves quantization awq, the base has none; start the node on the base's artifact"),
        (None, "none", "cannot say its quantization, the site says none; install mansard-vllm"),
    ],
)
def test_a_node_of_another_quantization_is_refused_though_its_folder_names_no_artifact(
    filled: Filled, serve_states: ServeStates, tmp_path: Path, told: str | None, stated: str | None, words: str
) -> None:
    server = serve_states()
    server.quantization = told
    with pytest.raises(BadInput, match=f"{server.endpoint} {words}"):
        capture(filled, [listed(server, "pooling", stated)], tmp_path / "a", [])
    assert not server.asked, "refused before any state is taken"


@pytest.mark.parametrize("told", [None, "none"])
def test_a_node_of_the_bases_quantization_gives_states(
    filled: Filled, serve_states: ServeStates, tmp_path: Path, told: str | None
) -> None:
    server = serve_states()
    server.quantization = told
    capture(filled, [listed(server, "serving", told)], tmp_path / "a", [])
    assert server.asked


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("kind", "generating", "kind 'generating' is not one of pooling, serving"),
        ("quantization", "int4", "quantization 'int4' is not one of awq, compressed-tensors, fp8, none"),
    ],
)
def test_a_word_for_a_node_that_does_not_exist_is_refused(tmp_path: Path, key: str, value: str, words: str) -> None:
    tree = yaml.safe_load((ROOT / "configs/site/local.yaml").read_text())
    tree["nodes"] = [{"endpoint": "http://127.0.0.1:9", "served_name": "base", key: value}]
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(BadInput, match=words):
        load_site(file)
