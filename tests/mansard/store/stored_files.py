"""Files of trees and of stores, as tests write, read and damage them."""

from pathlib import Path

from mansard.store.store import Store


def contents(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


def object_paths(store: Store) -> set[Path]:
    return {p for p in (store.root / "objects").rglob("*") if p.is_file()}


def object_path(store: Store, digest: str) -> Path:
    return store.root / "objects" / digest[:2] / digest


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder
