"""The traffic split: its laws, its file and its fencing by term."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.errors import BadInput, Conflict, Corrupt
from mansard.serving.split import (
    NUM_BUCKETS,
    ModelSplit,
    Split,
    VersionSplit,
    bucket_of,
    choose,
    is_newer_or_same,
    key_digest,
    parse_split,
    read_split,
    renewed,
    split_bytes,
    with_canary,
    with_endpoint,
    with_stable,
    with_stand_in,
    without_canary,
    without_version,
    write_split,
)

ONE, TWO, THREE = "http://127.0.0.1:8101", "http://127.0.0.1:8102", "http://127.0.0.1:8103"
PERCENT = st.integers(0, 100)


def walked(weight_percent: int, term: int = 2) -> Split:
    """Version 1 stable, version 2 canary."""
    return with_canary(with_stable(Split(), "tiny", 1, ONE, "tiny", 1), "tiny", 2, TWO, "tiny", weight_percent, term)


moves = st.lists(
    st.one_of(
        st.tuples(st.just("stable"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("canary"), st.integers(1, 6), PERCENT),
        st.tuples(st.just("abort"), st.just(0), st.just(0)),
        st.tuples(st.just("renew"), st.just(0), st.just(0)),
        st.tuples(st.just("endpoint"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("retire"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("stand in"), st.integers(1, 6), st.just(0)),
    ),
    max_size=20,
)


def moved(split: Split, kind: str, version: int, percent: int) -> Split:
    term = split.term + 1
    match kind:
        case "stable":
            return with_stable(split, "tiny", version, ONE, "tiny", term)
        case "canary":
            return with_canary(split, "tiny", version, TWO, "tiny", percent, term)
        case "abort":
            return without_canary(split, "tiny", term)
        case "renew":
            return renewed(split, "tiny")
        case "endpoint":
            return with_endpoint(split, "tiny", version, THREE, "tiny")
        case "stand in":
            return with_stand_in(split, "tiny", version, TWO, "tiny")
    return without_version(split, "tiny", version)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves)
def test_every_walk_conserves_weight_and_round_trips(walk: list[tuple[str, int, int]]) -> None:
    split = with_stable(Split(), "tiny", 1, ONE, "tiny", 1)
    for kind, version, percent in walk:
        try:
            after = moved(split, kind, version, percent)
        except BadInput:  # the canary is stable, or a version with a role would be retired
            continue
        weights = [v.weight_percent for v in after.models["tiny"].versions.values()]
        assert sum(weights) == 100
        if kind not in ("stable", "endpoint"):
            assert after.models["tiny"].journal_stable == split.models["tiny"].journal_stable
        assert parse_split(split_bytes(after), "test") == after
        assert is_newer_or_same(after, split)
        split = after


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(), PERCENT, PERCENT)
def test_raising_the_weight_only_adds_keys_to_the_canary(key: str, one: int, other: int) -> None:
    low, high = sorted((one, other))
    if choose(walked(low).models["tiny"], key_digest("tiny", key)) == 2:
        assert choose(walked(high).models["tiny"], key_digest("tiny", key)) == 2


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text())
def test_a_key_is_always_served_by_the_same_version(key: str) -> None:
    model, digest = walked(50).models["tiny"], key_digest("tiny", key)
    assert choose(model, digest) == choose(parse_split(split_bytes(walked(50)), "test").models["tiny"], digest)
    assert choose(walked(0).models["tiny"], digest) == 1
    assert choose(walked(100).models["tiny"], digest) == 2


@pytest.mark.parametrize("percent", [1, 5, 25, 50, 99])
def test_the_share_of_keys_is_the_weight(percent: int) -> None:
    model = walked(percent).models["tiny"]
    num_keys = 20_000
    share = sum(choose(model, key_digest("tiny", f"user-{i}")) == 2 for i in range(num_keys)) / num_keys
    deviation = (percent / 100 * (1 - percent / 100) / num_keys) ** 0.5
    assert abs(share - percent / 100) < 5 * deviation


def test_buckets_differ_between_models_and_are_written_in_stone() -> None:
    digests = [key_digest("tiny", "ada"), key_digest("tiny", "grace"), key_digest("other", "ada")]
    assert [digest % NUM_BUCKETS for digest in digests] == [387, 7237, 7067]
    assert [bucket_of(digest, "") for digest in digests] == [7315, 5948, 5941]


@given(st.integers(0, 2**64 - 1))
def test_a_rollout_keeps_its_salt_through_its_steps_and_another_puts_other_users_first(digest: int) -> None:
    salts = ["0" * 32, "f" * 32]
    stable = with_stable(Split(), "tiny", 1, ONE, "tiny", 1)
    for salt in salts:
        low, high = (with_canary(stable, "tiny", 2, TWO, "tiny", percent, 2, salt) for percent in (25, 50))
        assert parse_split(split_bytes(high), "test").models["tiny"].salt == salt
        assert salt not in repr(high)
        if choose(low.models["tiny"], digest) == 2:
            assert choose(high.models["tiny"], digest) == 2
        over = without_canary(high, "tiny", 3)
        assert over.models["tiny"].salt == "" and salt.encode() not in split_bytes(over)


def test_a_name_chosen_for_its_side_is_on_either_in_the_next_rollout() -> None:
    chosen = [d for d in range(4000) if bucket_of(d, "0" * 32) < 2500]
    share = sum(bucket_of(digest, "f" * 32) < 2500 for digest in chosen) / len(chosen)
    assert 0.2 < share < 0.3


def test_promotion_keeps_the_old_stable_resident_and_abort_removes_the_canary() -> None:
    promoted = with_stable(walked(100), "tiny", 2, TWO, "tiny", 3).models["tiny"]
    assert (promoted.stable, promoted.canary) == (2, None)
    assert {n: v.weight_percent for n, v in promoted.versions.items()} == {1: 0, 2: 100}
    aborted = without_canary(walked(25), "tiny", 3).models["tiny"]
    assert (aborted.stable, aborted.canary, set(aborted.versions)) == (1, None, {1})


def test_no_file_is_the_empty_split_of_term_zero(tmp_path: Path) -> None:
    assert read_split(tmp_path / "split.json") == Split(0, {})


def test_a_lower_term_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    write_split(path, walked(5, term=7))
    with pytest.raises(Conflict, match="term 6 is not newer than term 7"):
        write_split(path, walked(50, term=6))
    assert read_split(path) == walked(5, term=7)


def test_within_a_term_only_a_higher_lease_counter_or_the_same_split_is_written(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    first = walked(5)
    write_split(path, first)
    write_split(path, first)
    write_split(path, renewed(first, "tiny"))
    with pytest.raises(Conflict):
        write_split(path, first)
    with pytest.raises(Conflict):
        write_split(path, renewed(walked(6), "tiny"))
    assert read_split(path) == renewed(first, "tiny")


@pytest.mark.parametrize("kept", [0, 1, 40, -2])
def test_a_half_written_file_is_corrupt_and_the_next_writer_mends_it(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "split.json"
    path.write_bytes(split_bytes(walked(5))[:kept])
    with pytest.raises(Corrupt, match=r"split\.json.*not a whole JSON document"):
        read_split(path)
    write_split(path, walked(5))
    assert read_split(path) == walked(5)


def test_another_format_is_refused_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    path.write_text('{"format": 2}')
    with pytest.raises(BadInput, match="format 2"):
        read_split(path)
    with pytest.raises(BadInput, match="format 2"):
        write_split(path, walked(5))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: m["versions"]["2"].update(weight_percent=6),
        lambda m: m.update(canary=9),
        lambda m: m.update(canary=1),
        lambda m: m.update(stable="1"),
        lambda m: m["versions"]["2"].update(endpoint="file:///etc/passwd"),
        lambda m: m["versions"]["2"].pop("served_name"),
        lambda m: m.pop("lease_counter"),
        lambda m: m.update(versions=[]),
        lambda m: m.update(stands_in_for=1),
        lambda m: m.update(stands_in_for=2),
        lambda m: m.update(stands_in_for="3"),
    ],
)
def test_a_split_that_makes_no_sense_is_corrupt(wrong: object) -> None:
    tree = json.loads(split_bytes(walked(5)))
    assert callable(wrong)
    wrong(tree["models"]["tiny"])
    with pytest.raises(Corrupt):
        parse_split(json.dumps(tree).encode(), "test")


def test_weights_that_do_not_sum_to_100_are_not_written(tmp_path: Path) -> None:
    model = ModelSplit("tiny", 1, None, 0, {1: VersionSplit(99, ONE, "tiny")})
    with pytest.raises(Corrupt, match="sum to 100"):
        write_split(tmp_path / "split.json", Split(1, {"tiny": model}))
    assert not (tmp_path / "split.json").exists()


def test_a_canary_needs_a_stable_and_is_another_version() -> None:
    with pytest.raises(BadInput, match="no stable"):
        with_canary(Split(), "tiny", 1, ONE, "tiny", 5, 1)
    with pytest.raises(BadInput, match="is stable"):
        with_canary(walked(5), "tiny", 1, ONE, "tiny", 5, 3)
    beside_a_dead_stable = with_stand_in(with_stable(walked(5), "tiny", 2, TWO, "tiny", 3), "tiny", 1, ONE, "tiny")
    with pytest.raises(BadInput, match="version 2 is stable"):
        with_canary(beside_a_dead_stable, "tiny", 2, TWO, "tiny", 5, 4)
    with pytest.raises(BadInput, match="101"):
        with_canary(walked(5), "tiny", 2, TWO, "tiny", 101, 3)


def test_other_models_are_left_alone() -> None:
    both = with_stable(walked(5), "other", 1, THREE, "other", 3)
    after = without_canary(both, "tiny", 4)
    assert after.models["other"] == both.models["other"]
    assert dataclasses.replace(after, models={}) == Split(4, {})
