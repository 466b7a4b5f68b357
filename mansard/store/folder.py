"""A store's content in a folder of this machine: the plain backend, and the cache of a bucket.

Guarantees: everything is written in `incoming`, fsynced and renamed; names are read-only files; a touch is a file's
modification time. What lies in `incoming` while nobody writes is garbage.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from mansard.digest import digest_file
from mansard.store.backend import Listed
from mansard.store.disk import sync_folder, write_all

MODE = 0o444


class Folder:
    """The backend whose names are paths below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._incoming = root / "incoming"

    @property
    def url(self) -> str:
        return str(self._root)

    def path(self, name: str) -> Path:
        return self._root / name

    def listed(self, folder: str) -> Iterator[Listed]:
        for below, folders, files in os.walk(self.path(folder)):
            folders.sort()
            for file in sorted(files):
                path = Path(below, file)
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    found = path.stat()
                    yield Listed(str(path.relative_to(self._root)), found.st_blocks * 512, found.st_mtime)

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = self.path(name).stat().st_size
        return found

    def touch(self, names: Collection[str]) -> dict[str, int]:
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path(name))
                found[name] = self.path(name).stat().st_size
        return found

    def read(self, name: str) -> bytes | None:
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        self.add(name, lambda descriptor: write_all(descriptor, memoryview(data), 0))
        self.settle([name])

    def create(self, name: str, data: bytes) -> bool:
        """A hard link, because a rename would replace what another writer just made."""
        with self.beside(name, lambda descriptor: write_all(descriptor, memoryview(data), 0)) as beside:
            try:
                os.link(beside, self.path(name))
            except FileExistsError:
                return False
        self.settle([name])
        return True

    def add(self, name: str, fill: Callable[[int], object]) -> None:
        with self.beside(name, fill) as beside:
            beside.replace(self.path(name))

    def settle(self, names: Collection[str]) -> None:
        for folder in {self.path(name).parent for name in names}:
            sync_folder(folder)

    def open(self, name: str) -> int:
        return os.open(self.path(name), os.O_RDONLY)

    def digest(self, name: str) -> str | None:
        try:
            return digest_file(self.path(name))
        except FileNotFoundError:
            return None

    def remove(self, names: Collection[str]) -> int:
        """Counts the blocks that a file has on the disk: a sparse object frees nothing."""
        freed_bytes = 0
        for name in names:
            path = self.path(name)
            with contextlib.suppress(FileNotFoundError):
                blocks = path.stat().st_blocks
                path.unlink()
                freed_bytes += blocks * 512
        return freed_bytes

    def sweep(self) -> int:
        room_bytes = sum(item.room_bytes for item in self.listed("incoming"))
        shutil.rmtree(self._incoming, ignore_errors=True)
        return room_bytes

    @contextlib.contextmanager
    def beside(self, name: str, fill: Callable[[int], object]) -> Iterator[Path]:
        """The content, complete and fsynced, under a name of its own that is gone afterwards."""
        path = self.path(name)
        self._incoming.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._incoming / f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
            try:
                fill(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            yield beside
        finally:
            beside.unlink(missing_ok=True)
