"""Damaged split, site and key files: one line that says what is wrong, or a file that means something."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mansard.errors import MansardError
from mansard.serving.router.keys import KeyFile
from mansard.serving.router.split_watch import SplitWatch
from mansard.serving.split import Split, check_split, parse_split, split_bytes, with_canary, with_stable
from mansard.site import load_site

ROOT = Path(__file__).resolve().parents[3]
NUM_CASES = 400
SPLIT = split_bytes(
    with_canary(
        with_stable(Split(), "tiny", 1, "http://127.0.0.1:8100", "tiny", 3),
        *("tiny", 2, "http://127.0.0.1:8101", "tiny", 25, 4),
    )
)
VALUES = (
    b"null",
    b"-1",
    b"1e400",
    b"NaN",
    b'""',
    b"[]",
    b"{}",
    b"true",
    b"9" * 30,
    b'"http://["',
    b'"\\ud800"',
    b"[" * 9000,
)


def damaged(chance: random.Random, data: bytes) -> bytes:
    """`data` cut off, with bytes changed, doubled or taken out, or with a value replaced."""
    place = chance.randrange(len(data))
    way = chance.randrange(5)
    if way == 0:
        return data[:place]
    if way == 1:
        return data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]
    if way == 2:
        return data[:place] + data[place : place + 20] + data[place:]
    if way == 3:
        return data[:place] + data[place + chance.randrange(1, 20) :]
    start = data.find(b":", place)
    end = min((e for e in (data.find(mark, start + 1) for mark in (b",", b"}", b"\n")) if e > 0), default=len(data))
    return data if start < 0 else data[: start + 1] + chance.choice(VALUES) + data[end:]


def assert_one_line(read: Callable[[], object]) -> bool:
    """Whether it was refused; then with one line."""
    try:
        read()
    except MansardError as error:
        assert "\n" not in str(error)
        return True
    return False


def test_a_damaged_split_is_refused_or_still_obeys_the_laws(tmp_path: Path) -> None:
    chance, num_refused = random.Random(3), 0
    path = tmp_path / "split.json"
    for _ in range(NUM_CASES):
        data = damaged(chance, SPLIT)
        if assert_one_line(lambda data=data: parse_split(data, "split")):  # type: ignore[misc]
            num_refused += 1
        else:
            check_split(parse_split(data, "split"), "split")
        path.write_bytes(data)
        watch = SplitWatch(path, 10, lambda: 0.0)
        assert watch.poll() is (watch.problem is None)
    assert num_refused > NUM_CASES // 2


@pytest.mark.parametrize(
    "endpoint", ["http://[", "http://127.0.0.1:99999", "http://127.0.0.1", "http://:80", "https://a:1"]
)
def test_an_endpoint_that_cannot_be_connected_to_is_refused(endpoint: str) -> None:
    tree = json.loads(SPLIT)
    tree["models"]["tiny"]["versions"]["1"]["endpoint"] = endpoint
    with pytest.raises(MansardError, match="endpoint"):
        parse_split(json.dumps(tree).encode(), "split")


def test_a_name_that_no_header_can_hold_is_refused() -> None:
    with pytest.raises(MansardError, match="name"):
        parse_split(SPLIT.replace(b'"tiny":{', b'"ti\\nny":{'), "split")


def test_a_damaged_site_is_refused_with_one_line_or_loads(tmp_path: Path) -> None:
    chance, num_refused = random.Random(5), 0
    path, data = tmp_path / "site.yaml", (ROOT / "configs/site/local.yaml").read_bytes()
    for _ in range(NUM_CASES // 4):
        path.write_bytes(damaged(chance, data))
        num_refused += assert_one_line(lambda: load_site(path))
    assert num_refused > 10


def test_a_damaged_key_file_is_refused_with_one_line_or_loads(tmp_path: Path) -> None:
    chance, num_refused = random.Random(9), 0
    path, data = (
        tmp_path / "keys.yaml",
        f'acme: {{keys: ["{"ab" * 32}"], requests_per_minute: 6, models: [a]}}\n'.encode(),
    )
    for _ in range(NUM_CASES // 2):
        path.write_bytes(damaged(chance, data))
        num_refused += assert_one_line(lambda: KeyFile(path).read())
    assert num_refused > 50
