"""What a worker believes about the split, with a clock of our own."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.serving.router.split_watch import SplitWatch
from mansard.serving.split import Split, choose, key_digest, renewed, split_bytes, with_canary, with_stable, write_split


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def walked(term: int, weight_percent: int = 100) -> Split:
    stable = with_stable(Split(), "tiny", 1, "http://127.0.0.1:1", "tiny", 1)
    return with_canary(stable, "tiny", 2, "http://127.0.0.1:2", "tiny", weight_percent, term)


def test_no_file_yet_is_nothing_to_serve(tmp_path: Path) -> None:
    watch = SplitWatch(tmp_path / "split.json", 10, Clock())
    assert (watch.poll(), watch.split, watch.problem) == (False, Split(), None)


def test_the_lease_runs_out_by_the_workers_clock_and_a_higher_counter_brings_it_back(tmp_path: Path) -> None:
    path, clock, split = tmp_path / "split.json", Clock(), walked(2)
    watch = SplitWatch(path, 10, clock)
    write_split(path, split)
    assert watch.poll()
    clock.now += 9.9
    assert watch.has_lease("tiny")
    assert choose(watch.serving("tiny"), key_digest("tiny", "k")) == 2
    clock.now += 0.1
    assert not watch.has_lease("tiny")
    assert choose(watch.serving("tiny"), key_digest("tiny", "k")) == 1
    write_split(path, renewed(split, "tiny"))
    assert watch.poll()
    assert choose(watch.serving("tiny"), key_digest("tiny", "k")) == 2


def test_the_same_bytes_written_again_renew_nothing(tmp_path: Path) -> None:
    path, clock, split = tmp_path / "split.json", Clock(), walked(2)
    watch = SplitWatch(path, 10, clock)
    for _ in range(3):
        write_split(path, split)
        watch.poll()
        clock.now += 4
    assert not watch.has_lease("tiny")


def test_without_a_canary_there_is_no_lease_to_lose(tmp_path: Path) -> None:
    path, clock = tmp_path / "split.json", Clock()
    watch = SplitWatch(path, 10, clock)
    write_split(path, with_stable(Split(), "tiny", 1, None, "tiny", 1))
    watch.poll()
    clock.now += 1e9
    assert watch.has_lease("tiny")


@contextlib.contextmanager
def no_free_descriptor() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_split_that_could_not_be_read_is_taken_later_without_another_write(tmp_path: Path) -> None:
    path, clock = tmp_path / "split.json", Clock()
    watch = SplitWatch(path, 10, clock)
    write_split(path, walked(2))
    assert watch.poll()
    write_split(path, walked(3))
    with no_free_descriptor():
        assert not watch.poll()
        clock.now += 60
        assert not watch.poll()
    assert "Too many open files" in (watch.problem or "")
    assert (watch.problem_seconds, watch.split.term) == (60.0, 2)
    assert watch.poll()
    assert (watch.problem, watch.problem_seconds, watch.split.term) == (None, 0.0, 3)


def test_a_split_of_the_same_size_and_time_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    watch = SplitWatch(path, 10, Clock())
    path.write_bytes(split_bytes(walked(2)))
    assert watch.poll()
    status = path.stat()
    path.write_bytes(split_bytes(walked(3)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert watch.poll()
    assert watch.split.term == 3


def test_a_half_written_split_and_one_that_is_gone_are_told_and_looked_at_again(tmp_path: Path) -> None:
    path, whole = tmp_path / "split.json", split_bytes(walked(3))
    watch = SplitWatch(path, 10, Clock())
    write_split(path, walked(2))
    assert watch.poll()
    path.write_bytes(whole[:40])
    assert not watch.poll()
    assert "not a whole JSON" in (watch.problem or "")
    path.unlink()
    assert not watch.poll()
    assert "No such file" in (watch.problem or "")
    path.mkdir()
    assert not watch.poll()
    assert "directory" in (watch.problem or "")
    path.rmdir()
    path.write_bytes(whole)
    assert watch.poll()
    assert (watch.problem, watch.split.term) == (None, 3)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.permutations(range(1, 6)))
def test_whatever_the_order_of_the_files_the_term_in_force_only_rises(
    tmp_path_factory: pytest.TempPathFactory, terms: list[int]
) -> None:
    path = tmp_path_factory.mktemp("split") / "split.json"
    watch = SplitWatch(path, 10, Clock())
    seen = []
    for term in terms:
        path.unlink(missing_ok=True)
        path.write_bytes(split_bytes(walked(term)))
        watch.poll()
        seen.append(watch.split.term)
        assert (watch.problem is None) == (term == watch.split.term)
    assert seen == [max(terms[: i + 1]) for i in range(len(terms))]
