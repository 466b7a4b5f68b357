"""Logs are bounded while their writers write on."""

import subprocess
import sys
from pathlib import Path

from mansard.serving.log_rotation import rotate

WRITER = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


def test_a_large_log_moves_beside_and_its_writer_goes_on_at_the_beginning(tmp_path: Path) -> None:
    log = tmp_path / "engines/one.log"
    log.parent.mkdir()
    (tmp_path / "small.log").write_text("few\n")
    with (
        log.open("ab") as output,
        subprocess.Popen([sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=output, text=True) as writer,
    ):
        assert writer.stdin is not None
        writer.stdin.write("x" * 10_000 + "\n")
        writer.stdin.flush()
        while log.stat().st_size < 10_001:
            assert writer.poll() is None
        assert rotate(tmp_path, 4_096) == [log]
        writer.stdin.write("later\n")
    assert log.read_text() == "later\n"
    assert (tmp_path / "engines/one.log.1").read_text() == "x" * 10_000 + "\n"
    assert rotate(tmp_path, 4_096) == []


def test_a_copy_that_fails_does_not_keep_a_log_from_being_emptied(tmp_path: Path) -> None:
    log = tmp_path / "host.log"
    log.write_bytes(b"x" * 10_000)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "host.log.1").symlink_to(tmp_path / "elsewhere/missing/file")
    assert rotate(tmp_path, 4_096) == [log]
    assert log.read_bytes() == b""


def test_a_link_is_nobodys_log(tmp_path: Path) -> None:
    other = tmp_path / "data.bin"
    other.write_bytes(b"x" * 10_000)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/a.log").symlink_to(other)
    assert rotate(tmp_path / "logs", 4_096) == []
    assert other.stat().st_size == 10_000
