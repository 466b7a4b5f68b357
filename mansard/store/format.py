"""The store's format number, and which home a store belongs to.

Read-old rule: a store without `format.json` was written before there was one and is of format 1; a newer format is
refused before anything is read or written. Every folder has a random name (`home`); the first that writes to a bucket
owns it: others may read and write there, but only the owner's `collect` deletes, because only it knows the roots and
the work under way.
"""

import json
import os
from typing import Any

from mansard.canonical import canonical_json
from mansard.errors import BadInput, Corrupt, MansardError, NotAllowed
from mansard.store.backend import FORMAT_FILE, Backend
from mansard.store.folder import Folder

FORMAT = 1


def check_format(folder: Folder, backend: Backend) -> None:
    """MansardError for a newer format, BadInput for a folder that belongs to another store than `backend`."""
    found = _read(folder)
    theirs = folder.url if found is None or found["store"] is None else found["store"]
    is_new = found is None and not folder.path("manifests").exists()
    if theirs != backend.url and not is_new:
        raise BadInput(
            f"{folder.url}: belongs to the store {theirs}, not to {backend.url}; "
            "name that store in the site file, or another home"
        )
    if backend is not folder:
        _read(backend)


def mark(folder: Folder, backend: Backend) -> None:
    """Write the format where it is not written yet."""
    if _read(folder) is None:
        url = None if backend is folder else backend.url
        folder.create(FORMAT_FILE, canonical_json({"format": FORMAT, "home": os.urandom(16).hex(), "store": url}))
    if backend is not folder and _read(backend) is None:
        ours = _read(folder)
        assert ours is not None, "just made"
        backend.create(FORMAT_FILE, canonical_json({"format": FORMAT, "home": ours["home"], "store": backend.url}))


def check_owner(folder: Folder, backend: Backend) -> None:
    """NotAllowed where a bucket belongs to another home."""
    if backend is folder:
        return
    ours, theirs = _read(folder), _read(backend)
    home = "new" if ours is None else ours["home"][:12]
    if theirs is not None and theirs["home"][:12] != home:
        raise NotAllowed(
            f"{backend.url}: belongs to the home {theirs['home'][:12]}, this one is {home}; collect "
            f"there, where its versions are known (if that home is gone for good, remove {FORMAT_FILE} in the store)"
        )


def _read(backend: Backend) -> dict[str, Any] | None:
    data = backend.read(FORMAT_FILE)
    if data is None:
        return None
    try:
        found: dict[str, Any] = json.loads(data)
        number = found["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise Corrupt(f"{backend.url}/{FORMAT_FILE}: damaged; it should begin with format {FORMAT}") from error
    if type(number) is not int or number > FORMAT:
        raise MansardError(
            f"{backend.url}: store format {number!r}; this Mansard reads format {FORMAT}: use a newer one"
        )
    return found
