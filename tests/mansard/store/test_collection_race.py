"""A collect without any grace races with uploads, derivations and materializations of other processes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

import mansard
from mansard.store.backend import OBJECTS
from mansard.store.collection import collect
from mansard.store.store import Store

CHECKOUT = str(Path(mansard.__file__).parent.parent)
DEADLINE_SECONDS = 600.0

WORKER = """
import random, sys
from pathlib import Path
from mansard.store.snapshot import Blob, Manifest
from mansard.store.store import Store

root, seed, rounds, scratch = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
store, choose = Store(root, sys.argv[5] or None), random.Random(seed)

def content():
    return {f"f{choose.randrange(3)}": bytes([choose.randrange(6)]) * 5000 for _ in range(3)}

def tree(files):
    folder = scratch / f"{seed}-{choose.random()}"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder

def upload():
    files = content()
    with store.lease():
        taken = store.snapshot(tree(files))
        assert store.holds(taken), "taken, and gone at once"
        if choose.random() < 0.3:
            store.pin(taken)

def upload_without_a_lease():
    store.snapshot(tree(content()))

def derive():
    recipe = f"recipe-{choose.randrange(4)}"
    with store.lease(), store.lock(recipe):
        known = store.recall(recipe)
        if known is None:
            data = recipe.encode() * 1000
            digest = store.put_bytes(data)
            zeros = store.put_zeros(4000)
            known = store.put_manifest(Manifest({"x": Blob(digest, len(data)), "zeros": Blob(zeros, 4000)}))
            store.remember(recipe, known, {"inputs": {}})
        assert store.read_file(known, "x") == recipe.encode() * 1000
        assert store.recall(recipe) == known

def materialize():
    files = content()
    with store.lease():
        taken = store.put_files(files)
        with store.using(taken) as folder:
            assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
        store.restore(taken, scratch / f"out-{seed}-{choose.random()}")

for _ in range(rounds):
    choose.choice([upload, upload_without_a_lease, derive, materialize])()
"""


def race(store: Store, scratch: Path, seeds: list[int], rounds: int) -> None:
    """Workers and a collector at once; then nothing that was asked to stay is gone, and nothing else is left."""
    scratch.mkdir()
    words = [str(rounds), str(scratch), store.url or ""]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(store.root), str(seed), *words],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": CHECKOUT},
        )
        for seed in seeds
    ]
    num_gone = 0
    while any(worker.poll() is None for worker in workers):
        num_gone += len(collect(store, frozenset, grace_seconds=-1e6, wait_seconds=DEADLINE_SECONDS).snapshots)
    for worker in workers:
        assert worker.communicate(timeout=DEADLINE_SECONDS)[1] == ""
        assert worker.returncode == 0
    num_gone += len(collect(store, frozenset, grace_seconds=-1e6).snapshots)
    assert num_gone > 0
    assert set(store.snapshots()) == set(store.pins())
    assert store.verify() == []
    named = {digest for s in store.snapshots() for _, _, digest, _ in store.manifest(s).objects()}
    assert {listed.name.rpartition("/")[2] for listed in store.backend.listed(OBJECTS)} == named
    assert not any((store.root / "leases").iterdir())


@settings(max_examples=3)
@given(seeds=st.lists(st.integers(0, 2**20), min_size=3, max_size=3, unique=True))
def test_a_collect_that_races_with_all_kinds_of_work_loses_nothing(seeds: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        race(Store(Path(folder) / "store"), Path(folder) / "scratch", seeds, rounds=25)


def test_a_collect_that_races_with_work_in_a_bucket_loses_nothing(bucket_url: str, tmp_path: Path) -> None:
    race(Store(tmp_path / "store", bucket_url), tmp_path / "scratch", [1, 2], rounds=8)
