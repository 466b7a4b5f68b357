"""Snapshots as data: the manifest of a tree, the scan that finds a tree's files, and the rules for a model's tree.

A manifest holds content only (paths, sizes, digests), so the same bytes taken twice are one snapshot. It does not
hold empty folders, modes, owners or times. Nothing here writes; the store does.
"""

import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from mansard.canonical import canonical_json
from mansard.digest import digest_bytes
from mansard.errors import BadInput, MansardError
from mansard.records import SnapshotId
from mansard.store.safetensors_header import TensorEntry, header_prefix, parse_header_text, parse_safetensors_header

__all__ = [
    "Blob", "Manifest", "TensorEntry", "TensorFile", "check_model_tree", "check_weight_files", "is_digest",
    "parse_safetensors_header", "read_json_object", "scan_tree",
]  # fmt: skip

FORMAT = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_CODE = (".py", ".pyc", ".pyd", ".so")
_MAX_FILES = 1_000_000


@dataclass(frozen=True, slots=True)
class Blob:
    """A file kept whole as one object."""

    object: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file: its exact header text and one object per tensor. `size_bytes` is the whole file's."""

    header: str
    tensors: Mapping[str, str]
    size_bytes: int

    def entries(self, where: str = "manifest") -> tuple[TensorEntry, ...]:
        """The tensors in the order of their data."""
        return parse_header_text(self.header, where, self.size_bytes - len(header_prefix(self.header)))


@dataclass(frozen=True)
class Manifest:
    """What a snapshot consists of: relative POSIX path -> file. Its id is the BLAKE3 of `to_bytes()`."""

    files: Mapping[str, Blob | TensorFile]

    @cached_property
    def id(self) -> SnapshotId:
        return digest_bytes(self.to_bytes())

    @property
    def size_bytes(self) -> int:
        """Bytes of the restored tree."""
        return sum(f.size_bytes for f in self.files.values())

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json({"format": FORMAT, "files": {p: _file_json(f) for p, f in self.files.items()}})

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "Manifest":
        """Read what `to_bytes` wrote; another format number is refused in one line that begins with `where`."""
        tree = json.loads(data)
        if tree.get("format") != FORMAT:
            raise MansardError(
                f"{where}: manifest format {tree.get('format')!r}; this Mansard reads format {FORMAT}: use a newer one"
            )
        return Manifest({p: _file_of(f) for p, f in tree["files"].items()})

    def objects(self) -> Iterator[tuple[str, str | None, str, int]]:
        """(path, tensor name or None, object digest, bytes) of everything the tree consists of.

        AssertionError where a manifest contradicts itself: a path that leaves the tree, tensors unlike the header's.
        """
        for path, file in self.files.items():
            pure = PurePosixPath(path)
            is_inside = bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and str(pure) == path
            assert is_inside, f"bad path {path!r}"
            if isinstance(file, Blob):
                yield path, None, file.object, file.size_bytes
                continue
            entries = file.entries(path)
            assert {e.name for e in entries} == set(file.tensors), f"{path}: the tensors are not those of the header"
            for entry in entries:
                yield path, entry.name, file.tensors[entry.name], entry.size_bytes


def is_digest(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def scan_tree(tree: Path) -> dict[str, Path]:
    """Relative POSIX path -> real file of every regular file, sorted. Links inside the tree are followed.

    BadInput: not a folder, a link that leaves the tree or goes round, a device or socket, a name that is not UTF-8.
    """
    root = Path(os.path.realpath(tree))
    if not root.is_dir():
        raise BadInput(f"{tree}: not a folder; a snapshot is taken of a folder")
    files: dict[str, Path] = {}
    try:
        _scan(root, root, "", (root,), files)
    except OSError as error:
        raise BadInput(f"{error.filename}: cannot be read: {error.strerror}") from error
    return dict(sorted(files.items()))


def check_model_tree(tree: Path) -> None:
    """BadInput unless `tree` is a model whose files are data only: safetensors, config.json, no pickle, no code.

    An index must name the files and tensors that are there. Whether config and tensors agree is for the family.
    """
    files = scan_tree(tree)
    for name, path in files.items():
        if name.lower().endswith(_PICKLES):
            raise BadInput(
                f"{tree}: {name} may hold a pickle, which runs code when it is read; safetensors are expected"
            )
        if name.lower().endswith(_CODE):
            raise BadInput(f"{tree}: {name} is code; only models that transformers knows by itself are taken")
        if (
            name.endswith(CONFIG_FILE)
            and "/" not in name
            and "auto_map" in read_json_object(path.read_bytes(), str(path))
        ):
            raise BadInput(f"{path}: auto_map asks for remote code; only models that transformers knows are taken")
    if CONFIG_FILE not in files:
        raise BadInput(f"{tree}: no {CONFIG_FILE}; the folder of a Hugging Face model is expected")
    headers = {n: parse_safetensors_header(p) for n, p in files.items() if n.endswith(".safetensors")}
    index = files[INDEX_FILE].read_bytes() if INDEX_FILE in files else None
    check_weight_files({n: [e.name for e in entries] for n, (_, entries) in headers.items()}, index, str(tree))


def check_weight_files(tensors: Mapping[str, Collection[str]], index: bytes | None, where: str) -> None:
    """BadInput unless the safetensors files (path -> tensor names) are one checkpoint; folders below are left alone.

    Without an index that is `model.safetensors` alone; with one, exactly the files and tensors that it names.
    """
    found = {file: names for file, names in tensors.items() if "/" not in file}
    if not found:
        raise BadInput(
            f"{where}: no safetensors file; convert the model: save_pretrained(..., safe_serialization=True)"
        )
    if index is None:
        if set(found) != {WEIGHTS_FILE}:
            raise BadInput(f"{where}: {', '.join(sorted(found))}; {WEIGHTS_FILE} alone, or {INDEX_FILE}, is expected")
        return
    place = f"{where}/{INDEX_FILE}"
    weight_map = read_json_object(index, place).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadInput(f"{place}: weight_map is no mapping of tensor names to files")
    for name, file in weight_map.items():
        if file not in found:
            raise BadInput(f"{place}: names {file!r} for {name}, which is not there; fetch the missing file")
        if name not in found[file]:
            raise BadInput(f"{place}: {file} has no tensor {name!r}; the file and the index do not belong together")
    for file, names in found.items():
        for name in names:
            if weight_map.get(name) != file:
                raise BadInput(
                    f"{where}/{file}: tensor {name!r} is not in {INDEX_FILE} under this file; remove the file"
                )


def read_json_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object, or one BadInput line."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON: {error!s:.200}") from error
    if not isinstance(tree, dict):
        raise BadInput(f"{where}: holds a {type(tree).__name__}; a JSON object is expected")
    return tree


def _scan(root: Path, folder: Path, prefix: str, above: tuple[Path, ...], files: dict[str, Path]) -> None:
    with os.scandir(folder) as listing:
        items = list(listing)
    for item in items:
        name = prefix + item.name
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{folder}: the file name {item.name!r} is not UTF-8; rename it") from error
        real = Path(os.path.realpath(item.path)) if item.is_symlink() else Path(item.path)
        if not real.is_relative_to(root):
            raise BadInput(f"{item.path}: a link that leaves the tree (to {real}); put the file itself there")
        mode = real.lstat().st_mode if real.exists() else 0
        if stat.S_ISDIR(mode):
            if real in above:
                raise BadInput(f"{item.path}: a link to a folder above itself; remove it")
            _scan(root, real, f"{name}/", (*above, real), files)
        elif stat.S_ISREG(mode):
            files[name] = real
            if len(files) > _MAX_FILES:
                raise BadInput(f"{root}: more than {_MAX_FILES} files; name the folder of one model or data set")
        else:
            raise BadInput(f"{item.path}: neither a file nor a folder (a dangling link, socket or device); remove it")


def _file_json(file: Blob | TensorFile) -> dict[str, Any]:
    if isinstance(file, Blob):
        return {"object": file.object, "size_bytes": file.size_bytes}
    return {"header": file.header, "tensors": dict(file.tensors), "size_bytes": file.size_bytes}


def _file_of(tree: dict[str, Any]) -> Blob | TensorFile:
    if "object" in tree:
        return Blob(tree["object"], tree["size_bytes"])
    return TensorFile(tree["header"], tree["tensors"], tree["size_bytes"])
