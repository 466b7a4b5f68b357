"""The store in a bucket of a real S3 server: the same promises, with the local disk as a cache."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import obstore
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.store import S3Store

import mansard
from mansard.errors import BadInput, Corrupt, MansardError, NotAllowed
from mansard.launch import Request, derive, this_interpreter
from mansard.site import Site, load_site
from mansard.specs.surgery import Expand
from mansard.store.bucket import PART_BYTES, Bucket
from mansard.store.collection import collect, preview
from mansard.store.snapshot import TensorFile
from mansard.store.store import Store
from tests.mansard.store.stored_files import contents, write_tree

MakeCheckpoint = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[3]
CHECKOUT = str(Path(mansard.__file__).parent.parent)
DEADLINE_SECONDS = 300.0

TAKE = """
import sys
from pathlib import Path
from mansard.store.store import Store
print(Store(Path(sys.argv[1]), sys.argv[2]).snapshot(Path(sys.argv[3])))
"""


def start_taking(root: Path, url: str, tree: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", TAKE, str(root), url, str(tree)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": CHECKOUT})


def client(url: str) -> S3Store:
    """The bucket, past our own code."""
    name, _, prefix = url.removeprefix("s3://").partition("/")
    return S3Store(name, prefix=prefix, client_options={"allow_http": True})


def keys(url: str, folder: str = "") -> set[str]:
    return {meta["path"] for chunk in obstore.list(client(url), prefix=folder or None) for meta in chunk}


@pytest.fixture
def store(tmp_path: Path, bucket_url: str) -> Store:
    return Store(tmp_path / "store", bucket_url)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(files=st.dictionaries(st.sampled_from("abcde"), st.binary(max_size=100), max_size=4))
def test_any_tree_comes_back_from_a_bucket_to_another_machine(bucket_url: str, files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        taken = Store(root / "here", bucket_url).snapshot(write_tree(root / "tree", files))
        elsewhere = Store(root / "there", bucket_url)
        elsewhere.restore(taken, root / "out")
        assert contents(root / "out") == files
        assert contents(elsewhere.materialize(taken)) == files
        assert elsewhere.holds(taken)
        assert elsewhere.verify(taken) == []


def test_a_model_takes_its_room_once_and_is_found_again(
    store: Store, bucket_url: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    one, other = make_checkpoint(shards=1), make_checkpoint(shards=3)
    first = store.snapshot(one)
    before = keys(bucket_url, "objects")
    store.snapshot(other)
    assert len(keys(bucket_url, "objects") - before) == 1  # the index file
    store.remember("recipe", first, {"inputs": {}, "stage": "take"})
    elsewhere = Store(tmp_path / "elsewhere", bucket_url)
    assert elsewhere.recall("recipe") == first
    assert elsewhere.resolve(first[:12]) == first
    assert [record["stage"] for record in elsewhere.lineage(first)] == ["take"]
    elsewhere.restore(first, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(one)


def test_a_large_object_travels_in_parts(store: Store, bucket_url: str, tmp_path: Path) -> None:
    data = os.urandom(2 * PART_BYTES + 12345)
    taken = store.snapshot(write_tree(tmp_path / "tree", {"large": data, "empty": b""}))
    elsewhere = Store(tmp_path / "elsewhere", bucket_url)
    assert elsewhere.read_file(taken, "large") == data
    assert elsewhere.read_file(taken, "empty") == b""


def test_a_flipped_bit_in_the_bucket_is_found_and_named(
    store: Store, bucket_url: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    taken = store.snapshot(make_checkpoint())
    file, tensor = "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    part = store.manifest(taken).files[file]
    assert isinstance(part, TensorFile)
    name = f"objects/{part.tensors[tensor][:2]}/{part.tensors[tensor]}"
    data = bytearray(obstore.get(client(bucket_url), name).bytes())
    data[3] ^= 1
    obstore.put(client(bucket_url), name, bytes(data))
    assert [(d.snapshot, d.file, d.tensor) for d in store.verify()] == [(taken, file, tensor)]
    elsewhere = Store(tmp_path / "elsewhere", bucket_url)
    for act in (lambda: elsewhere.materialize(taken), lambda: elsewhere.restore(taken, tmp_path / "out")):
        with pytest.raises(Corrupt, match=part.tensors[tensor]):
            act()
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_in_the_cache_is_refused_and_fetched_again_by_verify(store: Store) -> None:
    taken = store.put_files({"x": b"content"})
    [copy] = [p for p in (store.root / "cache/objects").rglob("*") if p.is_file()]
    copy.chmod(0o644)
    copy.write_bytes(b"kontent")
    with pytest.raises(Corrupt, match="mansard verify"):
        store.read_file(taken, "x")
    assert store.verify() == []
    assert store.read_file(taken, "x") == b"content"


def test_the_cache_stays_within_its_bound_and_nothing_is_lost(bucket_url: str, tmp_path: Path) -> None:
    bucket = Bucket.at(bucket_url, tmp_path / "store", cache_bytes=50_000)
    digests = [f"{i:064x}" for i in range(20)]
    for i, digest in enumerate(digests):
        bucket.add(f"objects/{digest[:2]}/{digest}", lambda descriptor, i=i: os.write(descriptor, bytes([i]) * 10_000))
    cached = sum(p.stat().st_size for p in (tmp_path / "store/cache/objects").rglob("*") if p.is_file())
    assert 0 < cached <= 50_000
    assert set(bucket.sizes([f"objects/{d[:2]}/{d}" for d in digests]).values()) == {10_000}


def test_two_processes_of_two_machines_take_one_tree_at_once(bucket_url: str, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {f"{i}": os.urandom(2000) for i in range(20)})
    takers = [start_taking(tmp_path / name, bucket_url, tree) for name in ("here", "here", "there")]
    taken = {taker.communicate(timeout=DEADLINE_SECONDS)[0].strip() for taker in takers}
    assert len(taken) == 1
    store = Store(tmp_path / "third", bucket_url)
    assert store.verify() == []
    store.restore(taken.pop(), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tree)


def test_a_writer_killed_while_it_uploads_leaves_a_whole_store(
    store: Store, bucket_url: str, tmp_path: Path
) -> None:
    tree = write_tree(tmp_path / "tree", {f"{i}": os.urandom(2000) for i in range(100)})
    taker = start_taking(store.root, bucket_url, tree)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not keys(bucket_url, "objects") and taker.poll() is None and time.monotonic() < deadline:
        pass
    taker.kill()
    taker.communicate(timeout=DEADLINE_SECONDS)
    assert store.verify() == []
    assert all(store.holds(s) for s in store.snapshots())
    taken = store.snapshot(tree)
    assert store.holds(taken)
    assert store.verify() == []


def test_collect_frees_a_bucket_after_the_grace_period_only(store: Store, bucket_url: str) -> None:
    kept, gone = store.put_files({"x": b"x" * 100, "s": b"s"}), store.put_files({"y": b"y" * 100, "s": b"s"})
    store.remember("recipe", gone, {"inputs": {}})
    assert collect(store, lambda: {kept}).snapshots == ()
    later = time.time() + 2 * 24 * 3600
    assert preview(store, lambda: {kept}, clock=lambda: later).snapshots == (gone,)
    done = collect(store, lambda: {kept}, clock=lambda: later)
    assert (done.snapshots, done.num_objects) == ((gone,), 1)
    assert done.freed_bytes > 100
    assert keys(bucket_url, "manifests") == {f"manifests/{kept}"}
    assert len(keys(bucket_url, "objects")) == 2
    assert keys(bucket_url, "recipes") | keys(bucket_url, "lineage") == set()
    assert (store.holds(kept), store.recall("recipe"), store.verify()) == (True, None, [])


def test_a_touch_counts_though_s3_knows_none(store: Store) -> None:
    taken = store.put_files({"x": b"x"})
    old = time.time() - 5 * 24 * 3600
    marks = [p for p in (store.root / "used").rglob("*") if p.is_file()]
    for mark in marks:
        os.utime(mark, (old, old))
    store.put_files({"x": b"x"})
    touched = {p.relative_to(store.root / "used").parts[0] for p in marks if p.stat().st_mtime > old + 60}
    assert touched == {"objects", "manifests"}
    assert store.holds(taken)


def test_only_the_home_that_owns_a_bucket_collects_there(store: Store, bucket_url: str, tmp_path: Path) -> None:
    made = store.put_files({"x": b"x"})
    for name in ("never-wrote", "wrote"):
        other = Store(tmp_path / name, bucket_url)
        if name == "wrote":
            other.put_bytes(b"y")
        with pytest.raises(NotAllowed, match="belongs to the home") as caught:
            collect(other, frozenset, grace_seconds=-1e6)
        assert caught.value.exit_code == 5
    assert store.holds(made)


def test_a_folder_serves_one_store(store: Store, bucket_url: str, tmp_path: Path) -> None:
    store.put_bytes(b"x")
    with pytest.raises(BadInput, match="belongs to the store s3://"):
        Store(store.root).put_bytes(b"x")
    Store(tmp_path / "plain").put_bytes(b"x")
    with pytest.raises(BadInput, match="belongs to the store"):
        Store(tmp_path / "plain", bucket_url).snapshots()


def test_a_bucket_of_a_newer_format_is_refused(store: Store, bucket_url: str) -> None:
    obstore.put(client(bucket_url), "format.json", json.dumps({"format": 2}).encode())
    for act in (lambda: store.put_bytes(b"x"), lambda: store.snapshots()):
        with pytest.raises(MansardError, match="reads format 1"):
            act()


def test_a_server_that_is_down_and_a_bucket_that_is_not_there_are_one_line(
    s3_url: str, bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MansardError, match="is there such a bucket") as caught:
        Store(tmp_path / "one", f"s3://absent-{uuid4().hex}").put_bytes(b"x")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(MansardError, match="is the server up") as caught:
        Store(tmp_path / "two", bucket_url).put_bytes(b"x")
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_a_stage_of_a_site_with_a_bucket_works_in_the_bucket(
    bucket_url: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environments = {"main": this_interpreter(ROOT)}
    site = Site(tmp_path / "s.yaml", home, home, ("m",), environments, {"default": "main"}, store_url=bucket_url)
    store = Store.of(site)
    base = store.snapshot(make_checkpoint())
    request = Request("expand", {"model": base}, Expand(blocks=1).model_dump(mode="json"))
    made = derive(store, site, request)
    elsewhere = Store(tmp_path / "elsewhere", bucket_url)
    assert elsewhere.holds(made.snapshot)
    assert elsewhere.lineage(made.snapshot)[0]["inputs"] == {"model": base}
    assert derive(store, site, request).reused


def test_the_site_names_the_bucket(tmp_path: Path) -> None:
    text = (ROOT / "configs/site/local.yaml").read_text()
    path = tmp_path / "site.yaml"
    path.write_text(text + "store: s3://models/mansard\n")
    site = load_site(path)
    assert (site.store_url, site.store_uri) == ("s3://models/mansard", "s3://models/mansard")
    assert Store.of(site).url == "s3://models/mansard"
    for bad in ("gs://models", "s3://", "s3://Models/x y", "../store"):
        path.write_text(text + f"store: {bad}\n")
        with pytest.raises(BadInput, match=r"store: .* is not of the form s3://BUCKET"):
            load_site(path)
