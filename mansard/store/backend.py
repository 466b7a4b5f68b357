"""Where a store's content lasts: what the store asks of a folder (folder.py) or of a bucket (bucket.py).

Content has names: `objects/AB/DIGEST` for an object, `manifests/ID`, `recipes/RECIPE.json`, `lineage/ID/RECIPE.json`,
`pins/ID.json` and `format.json`. A name is there whole or not at all, whenever a writer is killed.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

OBJECTS = "objects"
FORMAT_FILE = "format.json"


def object_name(digest: str) -> str:
    return f"{OBJECTS}/{digest[:2]}/{digest}"


@dataclass(frozen=True, slots=True)
class Listed:
    """A name that is there. `room_bytes` is what it takes there (a hole in a file takes nothing), `used_at` when it was
    last written or touched, in seconds of the epoch."""

    name: str
    room_bytes: int
    used_at: float


class Backend(Protocol):
    """Safe for several threads and processes. Disk errors pass as OSError; a bucket's are MansardErrors."""

    @property
    def url(self) -> str:
        """Where it is, for people."""
        ...

    def listed(self, folder: str) -> Iterator[Listed]:
        """Every name below the folder, by name."""
        ...

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Bytes of those that are there."""
        ...

    def touch(self, names: Collection[str]) -> dict[str, int]:
        """Count them as used now; bytes of those that are there."""
        ...

    def read(self, name: str) -> bytes | None:
        """A small one's bytes; None where it is absent."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a small one; it lasts when this returns."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a small one unless it is there; of several writers at once exactly one gets True."""
        ...

    def add(self, name: str, fill: Callable[[int], object]) -> None:
        """Write or replace one whose bytes `fill` writes to a file descriptor; it lasts once `settle` returned."""
        ...

    def settle(self, names: Collection[str]) -> None:
        """Make what was added last."""
        ...

    def open(self, name: str) -> int:
        """A file descriptor to read it; FileNotFoundError where it is absent. The bytes are not checked."""
        ...

    def digest(self, name: str) -> str | None:
        """BLAKE3 of the bytes as they last; None where it is absent."""
        ...

    def remove(self, names: Collection[str]) -> int:
        """The bytes that this freed; absent ones count nothing."""
        ...

    def sweep(self) -> int:
        """Remove what writers that died left behind, while nobody writes; the bytes that this freed."""
        ...
