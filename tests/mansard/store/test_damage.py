"""A full disk and damaged content: one line each, never half a thing, and how it is made whole again."""

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mansard.digest import digest_bytes
from mansard.errors import Corrupt, MansardError
from mansard.store.snapshot import TensorFile
from mansard.store.store import Store
from tests.mansard.store.stored_files import contents, flip_bit, object_path, write_tree

MakeCheckpoint = Callable[..., Path]


@contextmanager
def room_for(size_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond `size_bytes`: a disk that is full, without a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_no_half_object(store: Store, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"large": os.urandom(3_000_000), "small": b"small"})
    with room_for(1_000_000):
        for act in (
            lambda: store.snapshot(tree),
            lambda: store.put_bytes(bytes(2_000_000)),
            lambda: store.put_zeros(2_000_000),
        ):
            with pytest.raises(MansardError, match="disk is full") as caught:
                act()
            assert caught.value.exit_code == 1
    assert not any((store.root / "incoming").iterdir())
    assert store.verify() == []
    taken = store.snapshot(tree)
    with room_for(1_000_000):
        with pytest.raises(MansardError, match="disk is full"):
            store.materialize(taken)
        with pytest.raises(MansardError, match="disk is full"):
            store.restore(taken, tmp_path / "out")
    assert not any((store.root / "trees").iterdir())
    assert not (tmp_path / "out").exists()
    assert contents(store.materialize(taken)) == contents(tree)


def test_a_flipped_bit_is_found_and_named(store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    taken = store.snapshot(make_checkpoint(shards=2))
    other = store.put_files({"other": b"other"})
    file, tensor = "model-00001-of-00002.safetensors", "model.layers.1.mlp.up_proj.weight"
    model = store.manifest(taken).files
    part = model[file] if tensor in getattr(model[file], "tensors", {}) else model[file.replace("00001", "00002", 1)]
    assert isinstance(part, TensorFile)
    flip_bit(object_path(store, part.tensors[tensor]))
    damages = store.verify()
    assert [(d.snapshot, d.tensor, d.digest) for d in damages] == [(taken, tensor, part.tensors[tensor])]
    assert damages == store.verify(taken)
    assert store.verify(other) == []
    assert f"snapshot {taken}: {damages[0].file}: tensor {tensor}: its bytes do not match" in str(damages[0])
    for act in (
        lambda: store.restore(taken, tmp_path / "out"),
        lambda: store.materialize(taken),
        lambda: store.read_file(taken, damages[0].file),
    ):
        with pytest.raises(Corrupt, match=tensor):
            act()
    assert not (tmp_path / "out").exists()
    assert not any((store.root / "trees").iterdir())


def test_a_damaged_object_is_replaced_as_verify_says(store: Store) -> None:
    taken = store.put_files({"x": b"content"})
    flip_bit(object_path(store, digest_bytes(b"content")))
    named = str(store.verify()[0]).split("remove ")[1].split(",")[0]
    (store.root / named).unlink()
    assert not store.holds(taken)
    assert store.put_files({"x": b"content"}) == taken
    assert store.verify() == []


def test_verify_tells_how_far_it_is(store: Store) -> None:
    taken = [store.put_files({"same": b"same", "own": bytes([i]) * 100}) for i in range(3)]
    seen: list[tuple[int, int]] = []
    assert store.verify(progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (304, 304)
    assert store.verify(taken[0], lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (104, 104)


def test_verify_names_what_is_absent_too_short_or_used_by_nobody(store: Store) -> None:
    taken = store.put_files({"absent": b"absent", "short": b"short"})
    unused = store.put_bytes(b"unused")
    object_path(store, digest_bytes(b"absent")).unlink()
    object_path(store, digest_bytes(b"short")).chmod(0o644)
    object_path(store, digest_bytes(b"short")).write_bytes(b"sho")
    flip_bit(object_path(store, unused))
    found = {(d.snapshot, d.file): d.what for d in store.verify()}
    assert found[taken, "absent"] == "absent"
    assert "has 3 bytes" in found[taken, "short"]
    assert "do not match" in found["", ""]
    assert not store.holds(taken)


def test_a_damaged_manifest_is_corrupt_and_named(store: Store) -> None:
    taken = store.put_files({"x": b"x"})
    flip_bit(store.root / "manifests" / taken)
    with pytest.raises(Corrupt, match=taken):
        store.manifest(taken)
    assert [str(d) for d in store.verify()] == [
        f"snapshot {taken}: its manifest does not match its digest; remove manifests/{taken}, "
        "then take or derive it again"
    ]
    assert store.put_files({"x": b"x"}) == taken
    assert store.verify() == []


def test_records_of_another_format_are_refused(store: Store) -> None:
    taken = store.put_files({"x": b"x"})
    store.remember("recipe", taken, {})
    (store.root / "recipes" / "recipe.json").write_text('{"format":2}')
    with pytest.raises(MansardError, match="reads format 1"):
        store.recall("recipe")
    data = b'{"files":{},"format":2}'
    (store.root / "manifests" / digest_bytes(data)).write_bytes(data)
    with pytest.raises(MansardError, match="reads format 1"):
        store.manifest(digest_bytes(data))


def test_a_damaged_record_is_named(store: Store) -> None:
    store.remember("recipe", store.put_files({"x": b"x"}), {})
    path = store.root / "recipes" / "recipe.json"
    path.write_text(json.dumps({"format": 1})[:-1])
    with pytest.raises(Corrupt, match=str(path)):
        store.recall("recipe")
