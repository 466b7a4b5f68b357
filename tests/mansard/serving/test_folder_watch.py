"""The folder watch tells of replaced and written files, once."""

import select
from pathlib import Path

from mansard.canonical import write_atomically
from mansard.serving.folder_watch import FolderWatch

DEADLINE_SECONDS = 60.0


def is_readable(watch: FolderWatch, seconds: float) -> bool:
    return bool(select.select([watch], [], [], seconds)[0])


def test_a_replaced_and_a_written_file_are_told_of_until_cleared(tmp_path: Path) -> None:
    with FolderWatch(tmp_path / "made") as watch:
        assert not is_readable(watch, 0)
        for write in (lambda p: write_atomically(p, b"x"), lambda p: p.write_bytes(b"y")):
            write(tmp_path / "made/split.json")
            assert is_readable(watch, DEADLINE_SECONDS)
            watch.clear()
            assert not is_readable(watch, 0)
        watch.clear()


def test_many_events_are_cleared_at_once(tmp_path: Path) -> None:
    with FolderWatch(tmp_path) as watch:
        for number in range(3000):
            (tmp_path / f"{number:0200}").touch()
        watch.clear()
        assert not is_readable(watch, 0)
