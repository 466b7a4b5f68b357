"""A bucket that accepts and never answers: every question ends by its limit with one line."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mansard.errors import MansardError
from mansard.store.backend import OBJECTS
from mansard.store.bucket import PART_BYTES, Bucket
from tests.mansard.hanging_server import hanging_server
from tests.mansard.s3_server import environment

URL = "s3://models/some/prefix"
NAME = f"{OBJECTS}/ab/{'ab' * 32}"
QUESTIONS: dict[str, Callable[[Bucket], object]] = {
    "a list of manifests": lambda bucket: list(bucket.listed("manifests")),
    f"the size of {NAME}": lambda bucket: bucket.open(NAME),
    f"the size of {NAME[:-1]}": lambda bucket: bucket.sizes([f"{NAME[:-1]}{digit}" for digit in range(100)]),
    "a read of format.json": lambda bucket: bucket.read("format.json"),
    "a write of format.json": lambda bucket: bucket.create("format.json", b"{}"),
    "a write of manifests/ab": lambda bucket: bucket.write("manifests/ab", b"{}"),
    f"a write of {NAME}": lambda bucket: bucket.add(NAME, lambda target: Path(f"/dev/fd/{target}").write_bytes(LARGE)),
}
LARGE = b"x" * (2 * PART_BYTES + 1)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with hanging_server() as url:
        for name, value in environment(url).items():
            monkeypatch.setenv(name, value)
        yield


@pytest.mark.parametrize("what", QUESTIONS)
def test_every_question_ends_with_one_line_that_names_bucket_question_and_time(
    hanging: None, tmp_path: Path, what: str
) -> None:
    bucket = Bucket.at(URL, tmp_path, request_seconds=0.5)
    with pytest.raises(MansardError, match="is the server up") as caught:
        QUESTIONS[what](bucket)
    said = str(caught.value)
    assert said.startswith(f"{URL}: no answer to {what}") and " after " in said and "\n" not in said
    assert caught.value.exit_code == 1


def test_a_silent_server_is_not_asked_again_at_once(hanging: None, tmp_path: Path) -> None:
    bucket = Bucket.at(URL, tmp_path, request_seconds=0.5)
    said = set()
    for name in ("manifests/ab", "manifests/cd"):
        with pytest.raises(MansardError) as caught:
            bucket.read(name)
        said.add(str(caught.value))
    assert len(said) == 1
