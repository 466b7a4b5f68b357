"""Laws of the store: any bit that flips is named, any newer format is refused, two writers are as good as one."""

import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mansard.canonical import canonical_json
from mansard.digest import digest_bytes
from mansard.errors import Corrupt, MansardError
from mansard.store.collection import collect
from mansard.store.store import Store

names = st.sampled_from(["a", "b/c", "d.json", "e.txt"])
trees = st.dictionaries(names, st.binary(min_size=1, max_size=300), min_size=1)


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where // 8 % len(data)] ^= 1 << where % 8
    path.chmod(0o644)
    path.write_bytes(data)


@settings(max_examples=25)
@given(files=trees, name=names, where=st.integers(0, 5000))
def test_any_flipped_bit_is_found_and_named_and_never_read(files: dict[str, bytes], name: str, where: int) -> None:
    name = name if name in files else next(iter(files))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        taken = store.put_files(files)
        digest = digest_bytes(files[name])
        flip(store.root / "objects" / digest[:2] / digest, where)
        hurt = {(taken, path) for path, data in files.items() if data == files[name]}
        assert {(d.snapshot, d.file) for d in store.verify()} == hurt
        assert all(digest in str(d) and d.snapshot in str(d) for d in store.verify())
        for act in (lambda: store.read_file(taken, name), lambda: store.restore(taken, Path(folder) / "out")):
            with pytest.raises(Corrupt, match=digest):
                act()
        assert not (Path(folder) / "out").exists()


@settings(max_examples=25)
@given(files=trees, where=st.integers(0, 5000))
def test_any_flipped_bit_of_a_manifest_is_found_and_named(files: dict[str, bytes], where: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        taken = store.put_files(files)
        flip(store.root / "manifests" / taken, where)
        assert taken in {d.snapshot for d in store.verify()}
        with pytest.raises(Corrupt, match=taken):
            store.manifest(taken)
        assert store.put_files(files) == taken
        assert store.verify() == []


formats = st.one_of(st.integers(), st.none(), st.text(max_size=3), st.floats(allow_nan=False), st.lists(st.integers()))


@settings(max_examples=25)
@given(number=formats.filter(lambda n: n != 1))
def test_a_manifest_of_any_other_format_is_refused_in_one_line_and_nothing_goes(number: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        kept = store.put_files({"x": b"x"})
        data = canonical_json({"format": number, "files": {}})
        (store.root / "manifests" / digest_bytes(data)).write_bytes(data)
        for act in (lambda: store.manifest(digest_bytes(data)), lambda: collect(store, frozenset)):
            with pytest.raises(MansardError, match="this Mansard reads format 1: use a newer one") as caught:
                act()
            assert "\n" not in str(caught.value)
        assert store.holds(kept)


@given(number=st.one_of(st.integers(2), st.none(), st.text(max_size=3), st.booleans()))
def test_a_store_of_a_newer_format_is_refused_before_anything_is_read_or_written(number: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        taken = store.put_files({"x": b"x"})
        path = store.root / "format.json"
        path.chmod(0o644)
        path.write_text(json.dumps({"format": number}))
        before = {p for p in store.root.rglob("*") if p.is_file()}
        acts: tuple[Callable[[Store], object], ...] = (
            lambda newer: newer.put_bytes(b"y"),
            lambda newer: newer.manifest(taken),
            lambda newer: newer.recall("recipe"),
            lambda newer: newer.snapshots(),
            lambda newer: collect(newer, frozenset, grace_seconds=-1e6),
        )
        for act in acts:
            with pytest.raises(MansardError, match="this Mansard reads format 1: use a newer one") as caught:
                act(Store(store.root))
            assert (caught.value.exit_code, "\n" in str(caught.value)) == (1, False)
        assert {p for p in store.root.rglob("*") if p.is_file()} == before


def test_a_store_from_before_there_was_a_format_file_is_read_and_gets_one(store: Store) -> None:
    taken = store.put_files({"x": b"x"})
    (store.root / "format.json").unlink()
    old = Store(store.root)
    assert (old.snapshots(), old.read_file(taken, "x")) == ([taken], b"x")
    assert not (store.root / "format.json").exists()
    old.put_bytes(b"y")
    assert json.loads((store.root / "format.json").read_bytes())["format"] == 1


def test_a_damaged_format_file_is_corrupt(store: Store) -> None:
    store.put_bytes(b"x")
    (store.root / "format.json").chmod(0o644)
    (store.root / "format.json").write_text("[")
    with pytest.raises(Corrupt, match=r"format\.json: damaged"):
        Store(store.root).snapshots()


@settings(max_examples=10)
@given(one=trees, other=trees)
def test_two_writers_at_once_make_what_they_make_one_after_the_other(
    one: dict[str, bytes], other: dict[str, bytes]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        together, apart = Store(Path(folder) / "together"), Store(Path(folder) / "apart")
        taken = [apart.put_files(files) for files in (one, other)]
        writers = [threading.Thread(target=Store(together.root).put_files, args=(f,)) for f in (one, other, one)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert together.snapshots() == sorted(set(taken))
        assert together.verify() == []
        for listed, alone in zip(together.backend.listed("objects"), apart.backend.listed("objects"), strict=True):
            assert (listed.name, listed.room_bytes) == (alone.name, alone.room_bytes)
        assert not any((together.root / "incoming").iterdir())
