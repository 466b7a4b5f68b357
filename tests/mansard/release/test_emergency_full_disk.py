"""Rollback on a disk that is full: the ballast gives it room."""

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest

from mansard.errors import JournalDown, MansardError
from mansard.release import emergency, oncall
from mansard.release.ballast import keep_ballast
from mansard.release.journal import Journal
from mansard.release.memory import remember
from mansard.serving import split as splits
from mansard.site import Site
from tests.mansard.release.outage import roll_back, state


@pytest.fixture
def small_disk(three: Site) -> Iterator[Site]:
    """The same site on a file system of its own with 24 MiB, full but for the ballast."""
    folder = three.home / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"left out: a full disk; a small one cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        small = replace(three, home=folder)
        for path in (*three.home.glob("journal.sqlite3*"), three.split_file):
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "store").symlink_to(three.store)
        with Journal.open(small.journal) as journal:
            remember(small, journal)
        keep_ballast(small)
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        yield small
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_under_the_journal_stops_no_rollback(small_disk: Site) -> None:
    with pytest.raises(JournalDown, match="is the disk full"):
        Journal.open(small_disk.journal)
    assert oncall.status(small_disk, "demo")["stable"]["version"] == 3
    done = roll_back(small_disk, why="night")
    assert (done["changed"], done["stable"], done["journal"]) == (True, 2, "")
    assert not small_disk.ballast_file.exists()
    assert state(small_disk)[1:] == (2, None)


def test_a_full_disk_and_no_journal_stop_no_rollback_either(small_disk: Site) -> None:
    for path in small_disk.home.glob("journal.sqlite3*"):
        path.unlink()
    (small_disk.home / "journal.sqlite3").write_text("not a database. " * 500)
    with suppress(OSError), (small_disk.home / "more").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    done = roll_back(small_disk)
    assert (done["changed"], done["stable"]) == (True, 2)
    assert [r.to for r in emergency.waiting(small_disk)] == [2]


def test_a_disk_that_is_full_to_the_last_byte_is_one_line_and_changes_nothing(small_disk: Site) -> None:
    small_disk.ballast_file.unlink()
    with suppress(OSError), (small_disk.home / "more").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    before = splits.read_split(small_disk.split_file)
    with pytest.raises(MansardError, match=r"No space left|disk is full"):
        roll_back(small_disk)
    assert splits.read_split(small_disk.split_file) == before
