"""What `collect` frees and what it never touches, whoever else is at work."""

import os
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mansard
from mansard.errors import BadInput, Corrupt, MansardError
from mansard.records import SnapshotId
from mansard.store.backend import Listed, object_name
from mansard.store.collection import Content, Plan, collect, plan, preview
from mansard.store.locks import file_lock
from mansard.store.store import Store

CHECKOUT = str(Path(mansard.__file__).parent.parent)
DEADLINE_SECONDS = 300.0
DAY = 24 * 3600.0
NO_ROOTS: frozenset[SnapshotId] = frozenset()


def no_roots() -> Collection[SnapshotId]:
    return NO_ROOTS


def age(store: Store, seconds: float = 2 * DAY) -> None:
    """Everything in the store was last used that long ago."""
    then = time.time() - seconds
    for folder in ("objects", "manifests", "recipes", "lineage"):
        for path in (store.root / folder).rglob("*"):
            if path.is_file():
                os.utime(path, (then, then))


def object_bytes(store: Store) -> int:
    return sum(p.stat().st_blocks * 512 for p in (store.root / "objects").rglob("*") if p.is_file())


def test_what_nothing_needs_goes_and_the_bytes_are_counted(store: Store) -> None:
    kept = store.put_files({"x": b"x" * 10_000, "shared": b"s" * 10_000})
    gone = store.put_files({"y": b"y" * 50_000, "shared": b"s" * 10_000})
    store.put_bytes(b"named by nothing" * 1000)
    age(store)
    before = object_bytes(store)
    told = preview(store, lambda: {kept})
    done = collect(store, lambda: {kept})
    assert store.snapshots() == [kept]
    assert (told.snapshots, told.num_objects) == (done.snapshots, done.num_objects) == ((gone,), 2)
    assert done.freed_bytes >= told.freed_bytes >= before - object_bytes(store) > 60_000
    assert done.kept == {"versions": 1, "pins": 0, "recent": 0}
    assert store.verify() == []
    assert collect(store, lambda: {kept}).freed_bytes == 0


def test_pins_and_what_was_used_lately_stay(store: Store) -> None:
    pinned, old, recalled = (store.put_files({"x": bytes([i])}) for i in range(3))
    store.remember("recipe", recalled, {"inputs": {}})
    store.pin(pinned, "for the paper")
    age(store)
    assert store.recall("recipe") == recalled
    fresh = store.put_files({"x": b"fresh"})
    done = collect(store, no_roots)
    assert done.snapshots == (old,)
    assert done.kept == {"versions": 0, "pins": 1, "recent": 2}
    assert store.pins() == {pinned: "for the paper"}
    assert all(store.holds(s) for s in (pinned, recalled, fresh))
    store.unpin(pinned)
    age(store)
    assert set(collect(store, no_roots).snapshots) == {pinned, recalled, fresh}
    assert not any(p.is_file() for p in (store.root / "objects").rglob("*"))


def test_the_recipes_and_lineage_of_what_goes_go_with_it(store: Store) -> None:
    gone, kept = store.put_files({"x": b"x"}), store.put_files({"y": b"y"})
    store.remember("of-gone", gone, {"inputs": {}})
    store.remember("moved", gone, {"inputs": {}})
    store.remember("moved", kept, {"inputs": {}})
    age(store)
    collect(store, lambda: {kept})
    assert store.recall("of-gone") is None
    assert store.recall("moved") == kept
    assert (store.lineage(gone), len(store.lineage(kept))) == ([], 1)
    assert not (store.root / "recipes" / "of-gone.json").exists()


def test_a_preview_changes_nothing(store: Store) -> None:
    store.put_files({"x": b"x"})
    age(store)
    before = {p: p.stat().st_mtime_ns for p in store.root.rglob("*")}
    assert len(preview(store, no_roots).snapshots) == 1
    assert {p: p.stat().st_mtime_ns for p in store.root.rglob("*")} == before


def test_nothing_used_since_work_under_way_began_goes(store: Store) -> None:
    needed, unneeded = store.put_files({"x": b"needed"}), store.put_files({"x": b"unneeded"})
    age(store)
    with store.lease([needed]):
        made = store.put_bytes(b"made, not yet listed")
        assert collect(store, no_roots, grace_seconds=-DAY).snapshots == (unneeded,)
        assert store.holds(needed)
        assert bytes(store.open_object(made)) == b"made, not yet listed"
    assert collect(store, no_roots, grace_seconds=-DAY).snapshots == (needed,)


def test_a_lease_reaches_back_as_far_as_it_says(store: Store) -> None:
    before, long_before = store.put_files({"x": b"1"}), store.put_files({"x": b"2"})
    for snapshot, seconds in ((before, 100.0), (long_before, 1000.0)):
        then = time.time() - seconds
        os.utime(store.root / "manifests" / snapshot, (then, then))
    with store.lease(reach_seconds=600):
        assert collect(store, no_roots, grace_seconds=0).snapshots == (long_before,)


HOLD = """
import sys
from pathlib import Path
from mansard.store.store import Store
with Store(Path(sys.argv[1])).lease():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lease_of_a_killed_process_counts_no_more(store: Store) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": CHECKOUT},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    made = store.put_files({"x": b"x"})
    assert collect(store, no_roots, grace_seconds=-DAY).snapshots == ()
    holder.kill()
    holder.communicate(timeout=DEADLINE_SECONDS)
    assert collect(store, no_roots, grace_seconds=-DAY).snapshots == (made,)
    assert not any((store.root / "leases").iterdir())


def test_nothing_goes_while_others_write(store: Store) -> None:
    made = store.put_files({"x": b"x"})
    age(store)
    with (
        file_lock(store.root / "locks" / "store", shared=True),
        pytest.raises(MansardError, match="nothing was removed"),
    ):
        collect(store, no_roots, wait_seconds=0.1)
    assert store.holds(made)


def test_a_root_that_appears_meanwhile_stays(store: Store) -> None:
    """A version may be registered between the look and the deleting phase."""
    made = store.put_files({"x": b"x"})
    age(store)
    answers = iter([NO_ROOTS, {made}])
    assert collect(store, lambda: next(answers)).snapshots == ()
    assert store.holds(made)


def test_nothing_goes_while_a_manifest_that_stays_is_damaged(store: Store) -> None:
    kept, other = store.put_files({"x": b"x"}), store.put_files({"y": b"y"})
    path = store.root / "manifests" / kept
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"x", b"z"))
    age(store)
    with pytest.raises(Corrupt, match=kept):
        collect(store, lambda: {kept})
    assert store.holds(other)


def test_trees_go_with_their_snapshots_unless_they_are_in_use(store: Store) -> None:
    gone, used = store.put_files({"x": b"x" * 9000}), store.put_files({"y": b"y"})
    store.materialize(gone)
    (store.root / "trees" / f".{gone}").mkdir()
    age(store)
    with store.using(used) as tree:
        done = collect(store, no_roots)
        assert set(done.snapshots) == {gone, used}
        assert [p.name for p in (store.root / "trees").iterdir()] == [used]
        assert (tree / "y").read_bytes() == b"y"
    assert done.freed_bytes >= 18_000
    with pytest.raises(BadInput, match="not in the store"):
        store.materialize(gone)


def test_unfinished_work_is_left_alone_and_counted(store: Store) -> None:
    (store.work("recipe") / "checkpoint").write_bytes(bytes(1000))
    done = collect(store, no_roots, grace_seconds=-DAY)
    assert done.unfinished_bytes >= 1000
    assert (store.work("recipe") / "checkpoint").stat().st_size == 1000


def test_only_what_is_whole_can_be_pinned_and_only_what_is_pinned_unpinned(store: Store) -> None:
    made = store.put_files({"x": b"x"})
    with pytest.raises(BadInput, match="not pinned"):
        store.unpin(made)
    for path in (store.root / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(BadInput, match="not whole"):
        store.pin(made)


ids = st.sampled_from([f"{i:064x}" for i in range(8)])
digests = st.sampled_from([f"{i:064x}" for i in range(100, 112)])
moments = st.integers(0, 10).map(float)


@given(
    contents=st.dictionaries(ids, st.frozensets(digests)),
    used=st.dictionaries(st.one_of(ids, digests), moments),
    loose=st.frozensets(digests),
    rooted=st.frozensets(ids),
    pinned=st.frozensets(ids),
    oldest=moments,
)
def test_a_plan_keeps_all_that_a_kept_snapshot_names_and_nothing_old_besides(
    contents: dict[str, frozenset[str]],
    used: dict[str, float],
    loose: frozenset[str],
    rooted: frozenset[str],
    pinned: frozenset[str],
    oldest: float,
) -> None:
    there = loose.union(*contents.values())
    snapshots = [Listed(f"manifests/{s}", 1, used.get(s, 0.0)) for s in contents]
    objects = [Listed(object_name(d), 1, used.get(d, 0.0)) for d in there]
    made: Plan = plan(Content(snapshots, objects, (), rooted, pinned), oldest, lambda s: contents[s])
    gone_objects = {o.name.rpartition("/")[2] for o in made.objects}
    for snapshot, named in contents.items():
        stays = snapshot in rooted or snapshot in pinned or used.get(snapshot, 0.0) >= oldest
        assert (snapshot in made.snapshots) != stays
        if stays:
            assert not named & gone_objects
    assert all(used.get(d, 0.0) < oldest for d in gone_objects)
    kept = frozenset().union(*(named for s, named in contents.items() if s not in made.snapshots))
    assert gone_objects == {d for d in there - kept if used.get(d, 0.0) < oldest}
    assert sum(made.kept.values()) + len(made.snapshots) == len(contents)
