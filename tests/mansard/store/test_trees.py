import os
import subprocess
import sys
from pathlib import Path

import pytest

import mansard
from mansard.errors import MansardError
from mansard.store.store import Store

CHECKOUT = str(Path(mansard.__file__).parent.parent)
DEADLINE_SECONDS = 120.0

HOLD = """
import sys
from pathlib import Path
from mansard.store.store import Store
with Store(Path(sys.argv[1])).using(sys.argv[2]) as tree:
    print(tree, flush=True)
    sys.stdin.read()
"""


def trees(store: Store) -> set[str]:
    return {p.name for p in (store.root / "trees").iterdir()}


def test_a_tree_is_read_only_and_made_once(store: Store) -> None:
    taken = store.put_files({"a/x": b"x", "y": b"y"})
    tree = store.materialize(taken)
    made = (tree / "a/x").stat()
    assert made.st_mode & 0o777 == 0o444
    assert made.st_nlink == 1
    assert store.materialize(taken) == tree
    assert (tree / "a/x").stat().st_ino == made.st_ino


def test_the_least_recently_used_tree_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", tree_cache_bytes=250)
    one, two, three = (store.put_files({"x": bytes([i]) * 100}) for i in range(3))
    for age, snapshot in ((30, one), (20, two)):
        tree = store.materialize(snapshot)
        os.utime(tree, (tree.stat().st_mtime - age, tree.stat().st_mtime - age))
    store.materialize(one)
    store.materialize(three)
    assert trees(store) == {one, three}


def test_a_tree_in_use_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", tree_cache_bytes=250)
    one, two, three = (store.put_files({"x": bytes([i]) * 100}) for i in range(3))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root), one],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": CHECKOUT},
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        os.utime(store.root / "trees" / one, (1, 1))
        store.materialize(two)
        store.materialize(three)
        assert trees(store) == {one, three}
        with store.using(three), pytest.raises(MansardError, match="does not fit"):
            store.materialize(two)
    finally:
        holder.communicate(timeout=DEADLINE_SECONDS)
    store.materialize(two)
    assert trees(store) == {two, three}


def test_a_tree_larger_than_the_cache_is_refused_in_one_line(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", tree_cache_bytes=99)
    with pytest.raises(MansardError, match="does not fit into a cache of 99"):
        store.materialize(store.put_files({"x": bytes(100)}))
    assert trees(store) == set()


def test_what_a_killed_builder_left_is_cleared_and_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", tree_cache_bytes=150)
    one, two = (store.put_files({"x": bytes([i]) * 100}) for i in range(2))
    for snapshot in (one, two):
        (store.root / "trees" / f".{snapshot}").mkdir(parents=True)
        (store.root / "trees" / f".{snapshot}" / "x").write_bytes(bytes(100))
    assert (store.materialize(two) / "x").read_bytes() == bytes([1]) * 100
    assert trees(store) == {two}


def test_an_error_of_the_user_of_a_tree_passes_unchanged(store: Store) -> None:
    taken = store.put_files({"x": b"x"})
    with pytest.raises(ConnectionError), store.using(taken):
        raise ConnectionError("of the caller")


def test_many_processes_build_one_tree_once(store: Store) -> None:
    taken = store.put_files({f"{i}": os.urandom(1000) for i in range(50)})
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(store.root), taken],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": CHECKOUT},
        )
        for _ in range(3)
    ]
    outputs = {b.communicate(timeout=DEADLINE_SECONDS)[0] for b in builders}
    assert outputs == {f"{store.root / 'trees' / taken}\n".encode()}
    assert trees(store) == {taken}
