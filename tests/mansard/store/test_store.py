import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

import mansard
from mansard.digest import digest_bytes
from mansard.errors import BadInput
from mansard.store.locks import file_lock, file_lock_if_free
from mansard.store.snapshot import Blob, Manifest
from mansard.store.store import Store
from tests.mansard.store.stored_files import contents, object_path, object_paths, write_tree

MakeCheckpoint = Callable[..., Path]
ABSENT = "ab" * 32
CHECKOUT = str(Path(mansard.__file__).parent.parent)
DEADLINE_SECONDS = 120.0

TAKE = """
import sys
from pathlib import Path
from mansard.store.store import Store
print(Store(Path(sys.argv[1])).snapshot(Path(sys.argv[2])))
"""


HOLD = """
import sys
from pathlib import Path
from mansard.store.store import Store
with Store(Path(sys.argv[1])).lock(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_taking(root: Path, tree: Path) -> "subprocess.Popen[str]":
    """Another process that takes `tree` into the store at `root` and prints the id."""
    command = [sys.executable, "-c", TAKE, str(root), str(tree)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": CHECKOUT})


names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=8
)
plain = st.binary(max_size=200)
tensors = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(lambda n: n != "__metadata__"),
    st.builds(
        lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 9, shape).astype(dtype),
        st.sampled_from(["float32", "float16", "int8", "int64"]),
        st.lists(st.integers(0, 4), max_size=3),
        st.integers(0, 3),
    ),
    max_size=5,
).map(save)
trees = st.dictionaries(
    names.filter(lambda n: n not in (".", "..")).map(lambda n: f"files/{n}"), plain, max_size=4
).flatmap(
    lambda files: st.dictionaries(names.map(lambda n: f"weights/{n}.safetensors"), tensors, max_size=3).map(
        lambda more: {**files, **more}
    )
)


@settings(max_examples=40)
@given(files=trees)
def test_any_tree_comes_back_byte_for_byte(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = Store(root / "store")
        (root / "tree").mkdir()
        taken = store.snapshot(write_tree(root / "tree", files))
        store.restore(taken, root / "out")
        assert contents(root / "out") == files
        assert contents(store.materialize(taken)) == files
        assert all(store.read_file(taken, path) == data for path, data in files.items())
        assert store.snapshot(root / "out") == taken
        assert store.holds(taken)
        assert store.verify() == []


def test_the_same_tensor_takes_its_room_once(store: Store, make_checkpoint: MakeCheckpoint) -> None:
    one, other = make_checkpoint(shards=1), make_checkpoint(shards=3)
    store.snapshot(one)
    before = object_paths(store)
    store.snapshot(other)
    new = object_paths(store) - before
    assert [p.read_bytes() for p in new] == [(other / "model.safetensors.index.json").read_bytes()]


def test_an_object_in_use_is_touched_and_not_rewritten(store: Store) -> None:
    digest = store.put_bytes(b"content")
    path = object_path(store, digest)
    os.utime(path, (1, 1))
    before = path.stat()
    store.put_bytes(b"content")
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mtime > 1
    os.utime(path, (1, 1))
    store.put_manifest(Manifest({"x": Blob(digest, 7)}))
    assert path.stat().st_mtime > 1


def test_an_object_that_lost_bytes_is_replaced(store: Store) -> None:
    digest = store.put_bytes(b"content")
    path = object_path(store, digest)
    path.chmod(0o644)
    path.write_bytes(b"cont")
    store.put_bytes(b"content")
    assert path.read_bytes() == b"content"


def test_objects_from_bytes_files_and_zeros_agree(store: Store, tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(3_000_001))
    digest = store.put_zeros(3_000_001)
    assert object_path(store, digest).stat().st_blocks == 0
    assert store.put_file(tmp_path / "zeros") == store.put_bytes(bytes(3_000_001)) == digest
    assert bytes(store.open_object(digest)) == bytes(3_000_001)
    assert store.put_bytes(memoryview(np.zeros((3, 5), np.int16))) == store.put_zeros(30)
    assert store.put_bytes(b"") == store.put_zeros(0) == digest_bytes(b"")
    assert bytes(store.open_object(digest_bytes(b""))) == b""


def test_zeros_stay_sparse_in_trees(store: Store) -> None:
    digest = store.put_zeros(1 << 24)
    tree = store.materialize(store.put_manifest(Manifest({"zeros": Blob(digest, 1 << 24)})))
    assert (tree / "zeros").stat().st_blocks == 0
    assert digest_bytes((tree / "zeros").read_bytes()) == digest


@pytest.mark.parametrize("path", [".", "sub/deep", "x.safetensors"])
def test_progress_counts_all_bytes(store: Store, make_checkpoint: MakeCheckpoint, path: str) -> None:
    seen: list[tuple[int, int]] = []
    store.snapshot(make_checkpoint(), lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


def test_a_broken_safetensors_file_leaves_nothing_behind(store: Store, make_checkpoint: MakeCheckpoint) -> None:
    tree = make_checkpoint()
    (tree / "model.safetensors").write_bytes((tree / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(BadInput, match="truncated"):
        store.snapshot(tree)
    assert not store.root.exists()


def test_a_file_that_changes_while_it_is_read_is_refused(store: Store, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {f"{i}": bytes([i]) * 10 for i in range(200)})

    def change(done: int, total: int) -> None:
        for path in tree.iterdir():
            path.write_bytes(b"other")

    with pytest.raises(BadInput, match="changed while it was read"):
        store.snapshot(tree, change)
    assert store.snapshots() == []
    assert store.verify() == []


def test_two_processes_take_one_tree_at_once(store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    same, more = make_checkpoint(depth=6), make_checkpoint(depth=8)
    takers = [start_taking(store.root, tree) for tree in (same, same, more)]
    taken = [taker.communicate(timeout=DEADLINE_SECONDS)[0].strip() for taker in takers]
    assert taken[0] == taken[1] != taken[2]
    assert store.verify() == []
    store.restore(taken[0], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(same)
    assert not any((store.root / "incoming").iterdir())


def test_a_writer_killed_anywhere_leaves_a_whole_store(store: Store, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {f"{i}": os.urandom(200_000) for i in range(300)})
    taker = start_taking(store.root, tree)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not object_paths(store) and taker.poll() is None and time.monotonic() < deadline:
        pass
    taker.kill()
    taker.communicate(timeout=DEADLINE_SECONDS)
    assert store.verify() == []
    assert all(store.holds(s) for s in store.snapshots())
    taken = store.snapshot(tree)
    store.restore(taken, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tree)


def test_a_writer_waits_for_the_deleting_phase(store: Store) -> None:
    order: list[str] = []

    def write() -> None:
        store.put_bytes(b"content")
        order.append("written")

    writer = threading.Thread(target=write)
    with file_lock(store.root / "locks" / "store"):
        writer.start()
        order.append("deleted")
    writer.join(DEADLINE_SECONDS)
    assert order == ["deleted", "written"]


@pytest.mark.parametrize("snapshot", [ABSENT, "short", "../" + ABSENT, ""])
def test_an_unknown_snapshot_is_bad_input(store: Store, snapshot: str, tmp_path: Path) -> None:
    assert not store.holds(snapshot)
    for act in (
        lambda: store.manifest(snapshot),
        lambda: store.materialize(snapshot),
        lambda: store.restore(snapshot, tmp_path / "out"),
        lambda: store.read_file(snapshot, "x"),
        lambda: store.resolve(snapshot),
    ):
        with pytest.raises(BadInput):
            act()
    assert not store.root.exists()


def test_a_manifest_with_absent_objects_is_refused(store: Store) -> None:
    with pytest.raises(BadInput, match="absent"):
        store.put_manifest(Manifest({"x": Blob(ABSENT, 1)}))
    with pytest.raises(BadInput, match="it has 7"):
        store.put_manifest(Manifest({"x": Blob(store.put_bytes(b"content"), 1)}))
    assert store.snapshots() == []


def test_a_prefix_names_one_snapshot(store: Store) -> None:
    ids = [store.put_files({"x": bytes([i])}) for i in range(20)]
    assert [store.resolve(i) for i in ids] == ids
    assert store.resolve(ids[0][:40]) == ids[0]
    shared = next(c for c in "0123456789abcdef" if sum(i.startswith(c) for i in ids) > 1)
    with pytest.raises(BadInput, match="more digits"):
        store.resolve(shared)


def test_what_a_recipe_made_is_recalled_while_it_is_held(store: Store) -> None:
    assert store.recall("recipe") is None
    taken = store.put_files({"x": b"x"})
    store.remember("recipe", taken, {"stage": "b", "begun_at": "2026-01-02"})
    store.remember("other", taken, {"stage": "a", "begun_at": "2026-01-01"})
    assert store.recall("recipe") == taken
    assert [record["stage"] for record in store.lineage(taken)] == ["a", "b"]
    object_path(store, digest_bytes(b"x")).unlink()
    assert store.recall("recipe") is None
    with pytest.raises(BadInput, match="not in the store"):
        store.remember("recipe", taken, {})


@pytest.mark.parametrize("ends", ["of itself", "killed"])
def test_a_lock_is_held_by_one_process_until_it_ends(store: Store, ends: str) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root), "recipe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": CHECKOUT},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with file_lock_if_free(store.root / "locks" / "recipe") as is_ours:
        assert not is_ours
    if ends == "killed":
        holder.kill()
    holder.communicate(timeout=DEADLINE_SECONDS)
    with store.lock("recipe"), store.lock("other"):
        pass


def test_scratch_survives_until_it_is_discarded(store: Store) -> None:
    (store.work("recipe") / "checkpoint").write_text("1")
    assert (Store(store.root).work("recipe") / "checkpoint").read_text() == "1"
    store.discard_work("recipe")
    store.discard_work("recipe")
    assert not any(store.work("recipe").iterdir())


def test_restore_takes_an_empty_folder_and_no_other(store: Store, tmp_path: Path) -> None:
    taken = store.put_files({"a/x": b"x"})
    (tmp_path / "empty").mkdir()
    store.restore(taken, tmp_path / "empty")
    assert contents(tmp_path / "empty") == {"a/x": b"x"}
    for place in ("empty", "empty/a/x"):
        with pytest.raises(BadInput, match="not empty"):
            store.restore(taken, tmp_path / place)
    store.restore(taken, tmp_path / "new/deep")
    assert contents(tmp_path / "new") == {"deep/a/x": b"x"}
    shutil.rmtree(store.root)
