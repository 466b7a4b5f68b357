"""A store's content in an S3 bucket; the local disk is then a cache of objects.

Through obstore (Rust's object_store), because it does what fsspec and s3fs do in Python threads outside the GIL:
parallel parts in both directions, retries, and conditional puts (`If-None-Match: *`), by which exactly one home comes
to own a bucket. Guarantees: a name is whole or absent (a multipart upload shows only when it is complete); what is
fetched is compared with its digest before it enters the cache; a cached copy that is damaged is fetched again by
`verify`; no request lasts longer than REQUEST_SECONDS, retries and all, whatever the server does (so large objects
travel in parts in both directions, few at once). Credentials, region and endpoint come from the environment
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL).
What is coordinated where: S3 knows no touch, so when a name was last used is an empty file of this machine (`used`),
and locks and leases are this machine's too. All that writes and collects runs on one control-plane host; another host
may read and write, but only the grace period, counted from the upload, keeps what it just wrote from a `collect`.
Aborted multipart uploads are for the bucket's lifecycle rules to clear.
"""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import obstore
from blake3 import blake3
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from mansard.errors import Corrupt, MansardError
from mansard.store.backend import OBJECTS, Listed
from mansard.store.disk import disk_errors, write_all
from mansard.store.folder import Folder

CACHE_BYTES = 200 << 30
PART_BYTES = 8 << 20
"""S3's own advice for ranged reads and parts is 8 to 16 MB."""
NUM_TRANSFERS = 8
"""Parts at once, of all objects: within REQUEST_SECONDS a link of 55 Mbit/s moves them."""
NUM_PARTS_HASHED = 4
"""Parts of one object that are fetched together and then hashed in their order."""
NUM_QUESTIONS = 16
REQUEST_SECONDS = 10.0
"""An operator at night waits for no server longer; what fails may be run again and goes on where it stopped."""
CONNECT_SECONDS = 5.0
SILENT_SECONDS = 10.0
"""So long a server that let a request time out is not asked again: a verb with many questions ends with the first."""

T = TypeVar("T")
R = TypeVar("R")


class Bucket:
    """The backend whose names are keys below a prefix."""

    def __init__(
        self, url: str, client: S3Store, root: Path, cache_bytes: int, request_seconds: float = REQUEST_SECONDS
    ) -> None:
        self._url = url
        self._client = client
        self._root = root
        self._cache = Folder(root / "cache")
        self._used = root / "used"
        self._bound_bytes = cache_bytes
        self._cached_bytes: int | None = None
        self._evicting = threading.Lock()
        self._transfers = threading.BoundedSemaphore(NUM_TRANSFERS)
        self._large_put = threading.Lock()
        self._request_seconds = request_seconds
        self._silent_until, self._silence = 0.0, ""

    @staticmethod
    def at(
        url: str, root: Path, cache_bytes: int = CACHE_BYTES, request_seconds: float = REQUEST_SECONDS
    ) -> "Bucket":
        """The bucket of `s3://BUCKET/PREFIX`; nothing is asked of it yet. No request lasts over `request_seconds`."""
        name, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        limit = timedelta(seconds=request_seconds)
        retries = {"max_retries": 5, "retry_timeout": limit}
        with _errors_of(url, "its name"):
            client = S3Store(
                name,
                prefix=prefix or None,
                client_options={
                    "allow_http": endpoint.startswith("http://"),
                    "timeout": limit,
                    "connect_timeout": min(limit, timedelta(seconds=CONNECT_SECONDS)),
                },
                retry_config=retries,  # type: ignore[arg-type]  # a TypedDict of which only some keys are given
            )
        return Bucket(url.rstrip("/"), client, root, cache_bytes, request_seconds)

    @property
    def url(self) -> str:
        return self._url

    def listed(self, folder: str) -> Iterator[Listed]:
        with self._asking(f"a list of {folder}"):
            for chunk in obstore.list(self._client, prefix=folder):
                for meta in chunk:
                    used_at = max(meta["last_modified"].timestamp(), self._used_at(meta["path"]))
                    yield Listed(meta["path"], meta["size"], used_at)

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        found = _at_once(self._size, names, NUM_QUESTIONS)
        return {name: size for name, size in zip(names, found, strict=True) if size is not None}

    def touch(self, names: Collection[str]) -> dict[str, int]:
        found = self.sizes(names)
        for name in found:
            self._mark(name)
        return found

    def read(self, name: str) -> bytes | None:
        with self._asking(f"a read of {name}"):
            try:
                return bytes(obstore.get(self._client, name).bytes())
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        self._mark(name)
        with self._asking(f"a write of {name}"):
            obstore.put(self._client, name, data)

    def create(self, name: str, data: bytes) -> bool:
        with self._asking(f"a write of {name}"):
            try:
                obstore.put(self._client, name, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def add(self, name: str, fill: Callable[[int], object]) -> None:
        """Into the cache first, because what was written is what a stage reads next."""
        self._cache.add(name, fill)
        self._mark(name)
        with os.fdopen(self._cache.open(name), "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            with (
                self._transfers if size_bytes <= PART_BYTES else self._large_put,
                self._asking(f"a write of {name}"),
            ):
                obstore.put(self._client, name, file, chunk_size=PART_BYTES, max_concurrency=NUM_TRANSFERS)
        self._make_room(size_bytes)

    def settle(self, names: Collection[str]) -> None:
        """A put lasts when it returns."""

    def open(self, name: str) -> int:
        """From the cache, fetched where it is absent there."""
        while True:
            try:
                descriptor = self._cache.open(name)
            except FileNotFoundError:
                with disk_errors(self._root):
                    self._fetch(name)  # another process may evict it at once: look again
            else:
                os.utime(descriptor)
                return descriptor

    def digest(self, name: str) -> str | None:
        """Of the bytes in the bucket. A damaged copy in the cache goes."""
        if self._cache.digest(name) not in (None, _digest_in(name)):
            self._cache.remove([name])
        size_bytes = self._size(name)
        if size_bytes is None:
            return None
        hasher = blake3()
        begins = range(0, size_bytes, PART_BYTES)
        for first in range(0, len(begins), NUM_PARTS_HASHED):
            together = begins[first : first + NUM_PARTS_HASHED]
            parts = _at_once(lambda begin: self._part(name, begin, size_bytes), together, NUM_PARTS_HASHED)
            for part in parts:
                hasher.update(part)
        return str(hasher.hexdigest())

    def remove(self, names: Collection[str]) -> int:
        names = list(names)
        found = self.sizes(names)
        if found:
            with self._asking(f"a removal of {len(found)} names"):
                obstore.delete(self._client, list(found))
        self._cache.remove(names)
        for name in names:
            (self._used / name).unlink(missing_ok=True)
        return sum(found.values())

    def sweep(self) -> int:
        return self._cache.sweep()

    def _size(self, name: str) -> int | None:
        with self._asking(f"the size of {name}"):
            try:
                return int(obstore.head(self._client, name)["size"])
            except FileNotFoundError:
                return None

    def _fetch(self, name: str) -> None:
        size_bytes = self._size(name)
        if size_bytes is None:
            raise FileNotFoundError(name)

        def fill(target: int) -> None:
            def move(begin: int) -> None:
                write_all(target, self._part(name, begin, size_bytes), begin)

            _at_once(move, range(0, size_bytes, PART_BYTES), NUM_TRANSFERS)

        with self._cache.beside(name, fill) as beside:
            found = blake3().update_mmap(beside).hexdigest()
            if found != _digest_in(name):
                raise Corrupt(f"{self._url}/{name}: its bytes do not match its digest; run: mansard verify")
            beside.replace(self._cache.path(name))
        self._make_room(size_bytes)

    def _part(self, name: str, begin: int, size_bytes: int) -> memoryview:
        with self._transfers, self._asking(f"a read of {name}"):
            end = min(begin + PART_BYTES, size_bytes)
            return memoryview(obstore.get_range(self._client, name, start=begin, end=end))

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """One request, with its errors as one line; refused at once while the server is known to be silent."""
        begun = time.monotonic()
        if begun < self._silent_until:
            raise MansardError(self._silence)
        try:
            with _errors_of(self._url, what):
                yield
        except MansardError as error:
            now = time.monotonic()
            if now - begun > self._request_seconds / 2:
                self._silent_until, self._silence = now + SILENT_SECONDS, str(error)
            raise

    def _make_room(self, new_bytes: int) -> None:
        """Evict the least recently used copies, down to nine tenths, once the cache is over its bound."""
        with self._evicting:
            if self._cached_bytes is None:
                self._cached_bytes = sum(copy.room_bytes for copy in self._cache.listed(OBJECTS))
            else:
                self._cached_bytes += new_bytes
            if self._cached_bytes <= self._bound_bytes:
                return
            copies = sorted(self._cache.listed(OBJECTS), key=lambda copy: copy.used_at)
            left = sum(copy.room_bytes for copy in copies)  # other processes add and evict too
            for copy in copies:
                if left > self._bound_bytes * 9 // 10:
                    self._cache.remove([copy.name])
                    left -= copy.room_bytes
            self._cached_bytes = left

    def _mark(self, name: str) -> None:
        path = self._used / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def _used_at(self, name: str) -> float:
        try:
            return (self._used / name).stat().st_mtime
        except FileNotFoundError:
            return 0.0


def _digest_in(name: str) -> str:
    return name.rpartition("/")[2]


def _at_once(act: Callable[[T], R], values: Collection[T], num_threads: int) -> list[R]:
    """In the order of `values`; the first error ends the rest."""
    if len(values) < 2:
        return [act(value) for value in values]
    with ThreadPoolExecutor(min(num_threads, len(values))) as pool:
        return list(pool.map(act, values))


@contextmanager
def _errors_of(url: str, what: str) -> Iterator[None]:
    """The client's errors as one line; `what` was asked for."""
    begun = time.monotonic()
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise MansardError(
            f"{url}: the server refuses these credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to some "
            "that may read and write there"
        ) from error
    except FileNotFoundError as error:  # whoever can do without a key caught it before
        raise MansardError(f"{url}: {' '.join(str(error).split())[:300]}; is there such a bucket?") from error
    except BaseError as error:
        first = " ".join(str(error).partition("Debug source")[0].split())[:200]
        raise MansardError(
            f"{url}: no answer to {what} after {time.monotonic() - begun:.1f} s ({first}); is the server up, and do "
            "AWS_ENDPOINT_URL and the AWS_ credentials name it?"
        ) from error
