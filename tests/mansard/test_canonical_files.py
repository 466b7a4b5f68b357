"""Files replaced atomically when something is short."""

import os
import resource
from pathlib import Path

import pytest

from mansard.canonical import write_atomically


def test_without_free_descriptors_the_old_file_stays_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    write_atomically(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.open(os.devnull, os.O_RDONLY)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            write_atomically(path, b"new")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
