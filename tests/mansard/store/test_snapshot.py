import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mansard.errors import BadInput, MansardError
from mansard.store.snapshot import Blob, Manifest, TensorFile, check_model_tree, scan_tree

MakeCheckpoint = Callable[..., Path]
DIGEST = "0" * 64
INDEX = "model.safetensors.index.json"


def refusal(tree: Path) -> str:
    with pytest.raises(BadInput) as caught:
        check_model_tree(tree)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_manifest_is_read_back_with_the_same_id() -> None:
    header = '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}   '
    manifest = Manifest({"é/x.txt": Blob(DIGEST, 4), "m.safetensors": TensorFile(header, {"a": DIGEST}, 8 + 56 + 3)})
    again = Manifest.from_bytes(manifest.to_bytes(), "here")
    assert again == manifest
    assert again.id == manifest.id
    assert list(again.objects()) == [("m.safetensors", "a", DIGEST, 3), ("é/x.txt", None, DIGEST, 4)]


def test_the_order_of_files_does_not_change_the_id() -> None:
    files = {"a": Blob(DIGEST, 1), "b": Blob(DIGEST, 2)}
    assert Manifest(files).id == Manifest(dict(reversed(files.items()))).id


def test_a_manifest_of_another_format_is_refused_in_one_line() -> None:
    with pytest.raises(MansardError, match="format 2; this Mansard reads format 1"):
        Manifest.from_bytes(b'{"format":2,"things":{}}', "snapshot x")


@pytest.mark.parametrize("path", ["../x", "/x", "a/../x", "a//x", "", "."])
def test_a_manifest_cannot_name_a_file_outside_its_tree(path: str) -> None:
    with pytest.raises(AssertionError):
        list(Manifest({path: Blob(DIGEST, 1)}).objects())


def test_a_scan_follows_links_inside_the_tree(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/x").write_text("x")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "y").symlink_to(tmp_path / "real/x")
    assert list(scan_tree(tmp_path)) == ["link/x", "real/x", "y"]


def test_a_scan_refuses_links_that_leave_the_tree(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    tree = tmp_path / "tree"
    tree.mkdir()
    for target in (tmp_path / "outside", Path("../outside"), Path("/etc"), tmp_path / "tree-beside"):
        (tree / "link").symlink_to(target)
        with pytest.raises(BadInput, match="leaves the tree"):
            scan_tree(tree)
        (tree / "link").unlink()


def test_a_scan_may_begin_at_a_link(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/x").write_text("x")
    (tmp_path / "link").symlink_to("tree")
    assert list(scan_tree(tmp_path / "link")) == ["x"]


@pytest.mark.parametrize("target", ["absent", "link", "."])
def test_a_scan_refuses_links_that_lead_nowhere_or_round(tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(BadInput, match="link"):
        scan_tree(tmp_path)


def test_a_scan_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="pipe"):
        scan_tree(tmp_path)
    (tmp_path / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(tmp_path)
        try:
            listener.bind("s")
        finally:
            os.chdir(here)
        with pytest.raises(BadInput, match="s: neither"):
            scan_tree(tmp_path)


def test_a_scan_refuses_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"a\xff")).write_text("")
    with pytest.raises(BadInput, match="not UTF-8"):
        scan_tree(tmp_path)


@pytest.mark.parametrize("name", ["absent", "file"])
def test_a_scan_wants_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="not a folder"):
        scan_tree(tmp_path / name)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_is_accepted(make_checkpoint: MakeCheckpoint, shards: int) -> None:
    check_model_tree(make_checkpoint(shards=shards))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "sub/a.PTH", "x.ckpt", "x.pkl"])
def test_a_model_with_a_pickle_is_refused(make_checkpoint: MakeCheckpoint, name: str) -> None:
    tree = make_checkpoint()
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_bytes(b"")
    assert name in refusal(tree)


@pytest.mark.parametrize("name", ["modeling_x.py", "sub/a.py", "kernel.so"])
def test_a_model_with_code_is_refused(make_checkpoint: MakeCheckpoint, name: str) -> None:
    tree = make_checkpoint()
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_bytes(b"")
    assert name in refusal(tree)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_asks_for_remote_code_is_refused(make_checkpoint: MakeCheckpoint, name: str) -> None:
    tree = make_checkpoint()
    if not (tree / name).exists():
        (tree / name).write_text("{}")
    edit_json(tree / name, auto_map={"AutoModel": "x.Y"})
    assert "auto_map" in refusal(tree)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"a":"\xff"}'])
def test_a_model_with_a_broken_config_is_refused(make_checkpoint: MakeCheckpoint, content: str) -> None:
    tree = make_checkpoint()
    (tree / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json" in refusal(tree)


def test_a_model_without_config_or_weights_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    tree = make_checkpoint()
    (tree / "config.json").rename(tree / "other.json")
    assert "no config.json" in refusal(tree)
    (tree / "other.json").rename(tree / "config.json")
    (tree / "model.safetensors").unlink()
    assert "no safetensors" in refusal(tree)


def test_a_model_with_a_stray_weight_file_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    tree = make_checkpoint()
    (tree / "consolidated.safetensors").write_bytes((tree / "model.safetensors").read_bytes())
    assert "consolidated.safetensors" in refusal(tree)
    (tree / "model.safetensors").unlink()
    assert "consolidated.safetensors" in refusal(tree)


def test_a_model_with_a_truncated_file_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    tree = make_checkpoint()
    whole = (tree / "model.safetensors").read_bytes()
    (tree / "model.safetensors").write_bytes(whole[:-1])
    assert "truncated" in refusal(tree)


def test_an_index_must_name_what_is_there(make_checkpoint: MakeCheckpoint) -> None:
    tree = make_checkpoint(shards=2)
    index = json.loads((tree / INDEX).read_text())
    names = index["weight_map"]
    first = min(names)
    edit_json(tree / INDEX, weight_map={**names, first: "absent.safetensors"})
    assert "absent.safetensors" in refusal(tree)
    edit_json(tree / INDEX, weight_map={**names, "more": names[first]})
    assert "'more'" in refusal(tree)
    edit_json(tree / INDEX, weight_map={n: f for n, f in names.items() if n != first})
    assert first in refusal(tree)
    edit_json(tree / INDEX, weight_map=[1])
    assert "weight_map" in refusal(tree)
    edit_json(tree / INDEX, weight_map=names)
    check_model_tree(tree)
