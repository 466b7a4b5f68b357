"""States on the wire, from nodes, and on disk."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mansard.errors import BadInput, StageFailed

pytestmark = pytest.mark.slow


def sequences(lengths: Sequence[int]) -> list[Any]:
    from mansard.carry_on.sequences import TokenSequence, key_of

    made = [numpy.arange(n, dtype=numpy.int32) + 1000 * i for i, n in enumerate(lengths)]
    return [TokenSequence(key_of(tokens), tokens) for tokens in made]


@dataclass
class Answers:
    """A node in this process: the state of a token is the token itself, twice; fails as told."""

    endpoint: str
    fails: set[int] = field(default_factory=set)
    always_fails: bool = False
    calls: int = 0
    given: list[int] = field(default_factory=list)

    def states(self, wanted: Sequence[Any]) -> list[Any]:
        import torch

        from mansard.carry_on.nodes import NodeFailed

        self.calls += 1
        if self.always_fails or self.calls in self.fails:
            raise NodeFailed(f"{self.endpoint} is down")
        self.given += [int(s.tokens[0]) for s in wanted]
        return [torch.from_numpy(s.tokens.copy()).float()[:, None].expand(-1, 2) for s in wanted]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    nodes=st.integers(1, 4),
    prefetch=st.integers(1, 5),
    fails=st.lists(st.sets(st.integers(1, 12), max_size=2), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_whatever_nodes_fail_every_sequence_comes_once_in_order(
    lengths: list[int], nodes: int, prefetch: int, fails: list[set[int]]
) -> None:
    import torch

    from mansard.carry_on.fetching import fetch
    from mansard.carry_on.sequences import groups

    wanted = sequences(lengths)
    asked = groups(wanted, max_tokens=10, max_sequences=3)
    serving = [Answers(f"node {i}", fails[i]) for i in range(nodes)]
    states = [s for answer in fetch(serving, asked, prefetch) for s in answer]
    assert [s[:, 0].tolist() for s in states] == [s.tokens.tolist() for s in wanted]
    given = sorted(t for node in serving for t in node.given)
    assert given == sorted(int(s.tokens[0]) for s in wanted)
    assert all(isinstance(s, torch.Tensor) for s in states)


def test_a_dead_node_is_left_alone_and_the_others_do_its_work() -> None:
    from mansard.carry_on.fetching import MAX_FAILURES, fetch

    wanted = [[s] for s in sequences([2] * 20)]
    dead, alive = Answers("dead", always_fails=True), Answers("alive")
    assert len(list(fetch([dead, alive], wanted, prefetch=4))) == 20
    assert len(alive.given) == 20
    assert dead.calls <= MAX_FAILURES + 1


def test_no_node_left_is_one_line() -> None:
    from mansard.carry_on.fetching import fetch

    with pytest.raises(StageFailed, match="no inference node is left: down is down"):
        list(fetch([Answers("down", always_fails=True)], [sequences([3])], prefetch=2))


def test_no_more_answers_wait_than_the_prefetch_allows() -> None:
    from mansard.carry_on.fetching import fetch

    node = Answers("eager")
    answers = fetch([node], [[s] for s in sequences([1] * 30)], prefetch=3)
    next(answers)
    assert node.calls <= 1 + 3
    answers.close()


def test_every_node_works_at_all_its_requests_at_once() -> None:
    from mansard.carry_on.fetching import REQUESTS_PER_NODE, fetch

    together = threading.Barrier(3 * REQUESTS_PER_NODE, timeout=60)

    class Waits(Answers):
        def states(self, wanted: Any) -> list[Any]:
            together.wait()
            return super().states(wanted)

    asked = [[s] for s in sequences([2] * 3 * REQUESTS_PER_NODE)]
    nodes = [Waits(f"node {number}") for number in range(3)]
    assert len(list(fetch(nodes, asked, prefetch=REQUESTS_PER_NODE))) == len(asked)


@pytest.mark.parametrize(("scheme", "most"), [("bf16", 0.004), ("fp8", 0.04), ("int8", 0.02)])
def test_states_keep_their_direction_and_first_tokens_stay_in_bf16(scheme: Any, most: float) -> None:
    import torch

    from mansard.carry_on.wire import decode, encode

    torch.manual_seed(0)
    states = torch.randn(40, 64)
    states[[0, 25]] *= 100.0  # the first token of a sequence, as models make it
    back = decode(encode(states, [0, 25], scheme), torch.tensor([0, 25]), torch.float32)
    distance = (back - states).norm(dim=-1) / states.norm(dim=-1)
    assert float(distance.max()) < most
    assert torch.equal(back[[0, 25]], states[[0, 25]].to(torch.bfloat16).float())


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize(("scheme", "largest"), [("fp8", 448.0), ("int8", 127.0)])
def test_codes_are_the_plain_formulas_byte_for_byte(
    scheme: Any, largest: float, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mansard.carry_on import wire

    monkeypatch.setattr(wire, "BLOCK_VALUES", 5 * 96)  # several blocks, the last one shorter
    values = (torch.randn(33, 96) * torch.logspace(-3, 3, 33)[:, None]).to(torch.bfloat16)
    values[7] = 0.0
    parts = values.float().unflatten(-1, (states, -1))
    scales = parts.abs().amax(-1).clamp(min=1e-12) / largest
    scaled = (parts / scales[..., None]).flatten(-2)
    wanted = scaled.round().to(torch.int8) if scheme == "int8" else scaled.to(torch.float8_e4m3fn)
    found = wire.encode(values, [0, 20], scheme, states)
    assert found.scales_N is not None and torch.equal(found.scales_N.view(33, -1), scales)
    assert torch.equal(found.states_ND.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int8"])
def test_shards_filled_from_several_nodes_are_those_of_states_coded_as_a_whole(scheme: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from mansard.carry_on.filling import fill
    from mansard.carry_on.shards import plan_shards
    from mansard.carry_on.wire import encode

    wanted = sequences([3, 4, 1, 6, 2, 5, 7, 1])
    shards = plan_shards(wanted, shard_tokens=7)
    nodes = [Answers("one", fails={1}), Answers("two", fails={2})]
    assert list(fill(nodes, tmp_path, shards, scheme)) == shards
    for shard in shards:
        assert shard.is_whole(tmp_path)
        lengths = torch.tensor([len(s.tokens) for s in shard.sequences])
        states = torch.cat([torch.from_numpy(s.tokens.copy()).float()[:, None].expand(-1, 2) for s in shard.sequences])
        whole = encode(states, (lengths.cumsum(0) - lengths).tolist(), scheme)
        found = load_file(tmp_path / shard.name)
        assert torch.equal(found["lengths"], lengths)
        assert torch.equal(found["states"].view(torch.uint8), whole.states_ND.view(torch.uint8))
        if whole.scales_N is not None and whole.first_SD is not None:
            assert torch.equal(found["scales"], whole.scales_N) and torch.equal(found["first"], whole.first_SD)


def test_shards_before_the_death_of_the_last_node_are_whole(tmp_path: Path) -> None:
    from mansard.carry_on.filling import REQUEST_TOKENS, fill
    from mansard.carry_on.nodes import NodeFailed
    from mansard.carry_on.shards import plan_shards

    class ShortLived(Answers):
        def states(self, wanted: Sequence[Any]) -> list[Any]:
            if wanted[0].tokens[0] >= 7000:
                raise NodeFailed(f"{self.endpoint} is down")
            return super().states(wanted)

    shards = plan_shards(sequences([REQUEST_TOKENS] * 12), shard_tokens=2 * REQUEST_TOKENS)
    with pytest.raises(StageFailed, match="no inference node is left"):
        list(fill([ShortLived("short-lived")], tmp_path, shards, "fp8"))
    whole = [shard.is_whole(tmp_path) for shard in shards]
    assert whole == [True] * 3 + [False] * 3, "what was under way when the node died is waited for"
    assert not list(tmp_path.glob(".*")), "of the shard under way nothing is left"
    rest = [shard for shard in shards if not shard.is_whole(tmp_path)]
    assert list(fill([Answers("next")], tmp_path, rest, "fp8")) == rest
    assert all(shard.is_whole(tmp_path) for shard in shards)


def test_a_disk_that_takes_no_more_ends_the_capture_with_its_error(tmp_path: Path) -> None:
    from mansard.carry_on.filling import fill
    from mansard.carry_on.shards import plan_shards

    shards = plan_shards(sequences([4] * 40), shard_tokens=80)
    (tmp_path / shards[1].name).mkdir()  # what is written cannot take its name
    filling = fill([Answers("node")], tmp_path, shards, "fp8")
    assert next(filling) == shards[0] and shards[0].is_whole(tmp_path)
    with pytest.raises(OSError):
        next(filling)
    assert not list(tmp_path.glob(".*"))


def test_states_that_are_not_finite_are_taken_from_another_node(tmp_path: Path) -> None:
    import torch

    from mansard.carry_on.filling import fill
    from mansard.carry_on.shards import plan_shards

    class Broken(Answers):
        def states(self, wanted: Sequence[Any]) -> list[Any]:
            return [torch.full((len(s.tokens), 2), float("nan")) for s in wanted]

    shards = plan_shards(sequences([3] * 9))
    assert list(fill([Broken("broken"), Answers("sound")], tmp_path, shards, "int8")) == shards
    with pytest.raises(StageFailed, match="broken: the states hold values that are not finite"):
        list(fill([Broken("broken")], tmp_path, shards, "int8"))


def test_one_scale_for_a_tensor_is_refused_with_the_reason() -> None:
    from mansard.carry_on.wire import check_scheme

    with pytest.raises(BadInput, match="destroys the states"):
        check_scheme("fp8_per_tensor")
    with pytest.raises(BadInput, match="one of bf16, fp8, int8"):
        check_scheme("fp4")


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_states_that_are_not_finite_are_refused(scheme: Any, value: float) -> None:
    import torch

    from mansard.carry_on.wire import encode

    states = torch.ones(40, 32, dtype=torch.bfloat16)
    states[29, 17] = value
    with pytest.raises(BadInput, match="not finite"):
        encode(states, [0], scheme)


@pytest.mark.parametrize("damage", ["cut", "flip", "no note"])
def test_a_damaged_shard_counts_as_absent(tmp_path: Path, damage: str) -> None:
    import torch

    from mansard.carry_on.shards import plan_shards, write_shard
    from mansard.carry_on.wire import encode

    (shard,) = plan_shards(sequences([3, 4]))
    write_shard(tmp_path, shard, [encode(torch.randn(n, 8), [0], "fp8") for n in (3, 4)], "fp8")
    assert shard.is_whole(tmp_path)
    file = tmp_path / shard.name
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "flip":
        data[-5] ^= 1
        file.write_bytes(data)
    else:
        (tmp_path / f"{shard.name}.json").unlink()
    assert not shard.is_whole(tmp_path)


def test_the_preflight_counts_bytes_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    from mansard.carry_on.shards import check_room, expected_bytes, plan_shards

    shards = plan_shards(sequences([100] * 10), shard_tokens=300)
    assert [shard.tokens for shard in shards] == [300, 300, 300, 100]
    assert expected_bytes(shards, "bf16", 64) == 1000 * 128
    assert expected_bytes(shards, "fp8", 64) == 1000 * 68 + 10 * 128
    check_room(1000, tmp_path, room=3000)
    with pytest.raises(BadInput, match=r"takes 1,000 bytes \(2,100 while it is taken\)"):
        check_room(1000, tmp_path, room=2000)


def test_rows_are_cut_into_the_segments_that_engines_see() -> None:
    from mansard.carry_on.sequences import segments_of

    tokens, positions = numpy.arange(7, dtype=numpy.int32), numpy.array([0, 1, 2, 0, 1, 0, 1], dtype=numpy.int32)
    assert [s.tokens.tolist() for s in segments_of(tokens, positions)] == [[0, 1, 2], [3, 4], [5, 6]]
