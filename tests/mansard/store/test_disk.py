"""A full disk, a read-only one, direct writes, and a kill at every step of a writer."""

import ctypes
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mansard.errors import MansardError
from mansard.store.collection import collect
from mansard.store.disk import DIRECT_BYTES, DIRECT_CHUNK_BYTES, copy_new
from mansard.store.store import Store
from tests.mansard.store.stored_files import contents, write_tree

DISK_BYTES = 4 << 20


@contextmanager
def mounted(folder: Path, size_bytes: int = DISK_BYTES) -> Iterator[Path]:
    """A disk of that size in memory; skips where this process may not mount one (no root, no CAP_SYS_ADMIN)."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"left out: a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@settings(max_examples=12)
@given(
    size_bytes=st.one_of(
        st.integers(0, 5000),
        st.integers(DIRECT_BYTES - 2, DIRECT_BYTES + 5000),
        st.integers(DIRECT_CHUNK_BYTES - 2, DIRECT_CHUNK_BYTES + 2),
    ),
    begin=st.integers(0, 9000),
)
def test_a_range_arrives_whole_through_the_page_cache_or_past_it(size_bytes: int, begin: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = os.urandom(begin + size_bytes + 100)
        (Path(folder) / "source").write_bytes(data)
        source = os.open(Path(folder) / "source", os.O_RDONLY)
        target = os.open(Path(folder) / "target", os.O_WRONLY | os.O_CREAT)
        try:
            copy_new(source, begin, target, size_bytes)
        finally:
            os.close(source)
            os.close(target)
        assert (Path(folder) / "target").read_bytes() == data[begin : begin + size_bytes]


def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_room(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"large": os.urandom(1_500_000), "larger": os.urandom(1_600_000)})
    with mounted(tmp_path / "disk") as disk:
        store = Store(disk / "store")
        small = store.put_files({"x": b"small"})
        (disk / "ballast").write_bytes(bytes(2_000_000))
        acts: tuple[Callable[[], object], ...] = (
            lambda: store.snapshot(tree),
            lambda: store.put_bytes(bytes(3_000_000)),
            lambda: store.put_files({"x": os.urandom(3_000_000)}),
            lambda: store.put_file(tree / "larger") + store.put_file(tree / "large"),
        )
        for act in acts:
            with pytest.raises(MansardError, match=r"the disk is full.*free some room and run again") as caught:
                act()
            assert (caught.value.exit_code, "\n" in str(caught.value)) == (1, False)
            assert store.snapshots() == [small]
            assert not any((store.root / "incoming").iterdir())
            assert store.verify() == []
            collect(store, lambda: {small}, grace_seconds=-1e6)
        (disk / "ballast").unlink()
        taken = store.snapshot(tree)
        assert store.verify() == []
        store.restore(taken, tmp_path / "out")
        assert contents(tmp_path / "out") == contents(tree)
        with pytest.raises(MansardError, match="the disk is full"):
            store.materialize(taken)
        assert not any((store.root / "trees").iterdir())
        assert store.holds(taken)


def test_a_read_only_store_gives_what_it_holds_and_says_so_when_asked_to_write(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk") as disk:
        store = Store(disk / "store")
        taken = store.put_files({"x": b"content"})
        store.remember("recipe", taken, {"inputs": {}})
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        try:
            reader = Store(disk / "store")
            assert reader.read_file(taken, "x") == b"content"
            assert reader.verify() == []
            assert (reader.snapshots(), reader.holds(taken)) == ([taken], True)
            reader.restore(taken, tmp_path / "out")
            assert contents(tmp_path / "out") == {"x": b"content"}
            acts: tuple[Callable[[], object], ...] = (
                lambda: reader.put_bytes(b"y"),
                lambda: reader.materialize(taken),
                lambda: reader.pin(taken),
                lambda: collect(reader, lambda: {taken}),
            )
            for act in acts:
                with pytest.raises(MansardError, match=r"Read-only file system; .* must be readable and writable"):
                    act()
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert store.recall("recipe") == taken


STEPS = (
    "open", "replace", "link", "fsync", "pwrite", "copy_file_range", "posix_fallocate", "truncate", "utime", "mkdir",
    "unlink",
)  # fmt: skip
"""What a writer asks of the system, by its name in `os`."""


def killed_at(step: int, act: Callable[[], object]) -> bool:
    """Run `act` in a process of its own that is killed (SIGKILL) right before its `step`th call; False: it ended."""
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # die with the test
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        count = 0

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def counting(*args: object, **options: object) -> object:
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)

            return counting

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        status = 2
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"ended with {status}"
    return status != 0


def test_a_writer_killed_at_any_step_leaves_a_whole_store_and_the_same_command_ends_the_same(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"a": os.urandom(DIRECT_BYTES + 5), "b": b"b" * 100, "c": b""})
    expected = Store(tmp_path / "undisturbed").snapshot(tree)

    def work(root: Path) -> None:
        store = Store(root)
        with store.lease():
            taken = store.snapshot(tree)
            store.remember("recipe", taken, {"inputs": {}})
            store.pin(taken)
        store.materialize(taken)

    step, num_kills = 1, 0
    while True:
        root = tmp_path / f"store-{step}"
        was_killed = killed_at(step, lambda root=root: work(root))  # type: ignore[misc]
        store = Store(root)
        assert store.verify() == []
        assert all(store.holds(snapshot) for snapshot in store.snapshots())
        assert store.recall("recipe") in (None, expected)
        work(root)
        assert (store.snapshots(), store.recall("recipe"), list(store.pins())) == ([expected], expected, [expected])
        assert contents(store.materialize(expected)) == contents(tree)
        collect(store, frozenset, grace_seconds=-1e6)
        assert store.snapshots() == [expected]
        assert [p for p in root.rglob("*") if p.parent.name in ("incoming", "leases")] == []
        assert {p.name for p in (root / "trees").iterdir()} == {expected}
        if not was_killed:
            break
        num_kills += 1
        step += 1 if step < 40 else 3
    assert num_kills >= 30


def test_a_collect_killed_at_any_step_leaves_every_listed_snapshot_whole(tmp_path: Path) -> None:
    step = 1
    while True:
        store = Store(tmp_path / f"store-{step}")
        kept, gone = store.put_files({"x": b"x", "s": b"s"}), store.put_files({"y": b"y", "s": b"s"})
        store.remember("recipe", gone, {"inputs": {}})
        store.materialize(gone)
        was_killed = killed_at(
            step, lambda store=store, kept=kept: collect(store, lambda: {kept}, grace_seconds=-1e6)  # type: ignore[misc]
        )
        assert store.verify() == []
        assert all(store.holds(snapshot) for snapshot in store.snapshots())
        collect(store, lambda kept=kept: {kept}, grace_seconds=-1e6)  # type: ignore[misc]
        assert (store.snapshots(), store.recall("recipe")) == ([kept], None)
        assert len([p for p in (store.root / "objects").rglob("*") if p.is_file()]) == 2
        assert not any((store.root / "trees").iterdir())
        assert contents(store.materialize(kept)) == {"x": b"x", "s": b"s"}
        if not was_killed:
            break
        step += 1
    assert step > 5
