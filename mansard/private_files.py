"""What a site's home holds is for its owner alone: files 600, folders 700, the home itself included.

Guarantees: processes that call `use_private_umask`, and those that they start, make nothing that others may read; what
an older program left open is closed by `close_home`. Not covered: what lies below `store` (content keeps the mode that
it was taken with, behind the home's own 700), and a home whose owner opens it again by hand.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from mansard.errors import BadInput, NotAllowed
from mansard.site import Site

UMASK = 0o077
NUM_NAMED = 3
KEY_SUFFIX = ".key"


def use_private_umask() -> None:
    """For this process and all that it starts."""
    os.umask(UMASK)


def open_paths(site: Site) -> list[tuple[Path, int]]:
    """What others may read, write or search in the home, with its mode."""
    return [(path, mode) for path, mode in _modes(site) if mode & UMASK]


def close_home(site: Site) -> list[str]:
    """Take the rights of others away; one line when something was open.

    Raises NotAllowed for a private key that others could read (it may have been read, so a new mode is not enough),
    BadInput for what another user owns.
    """
    opened = open_paths(site)
    for path, mode in opened:
        if path.suffix == KEY_SUFFIX and stat.S_ISREG(mode) and mode & 0o044:
            raise NotAllowed(
                f"{path}: others may read this private key (mode {stat.S_IMODE(mode):o}); make a new one, or, "
                f"where nobody else was on this machine: chmod 600 {path}"
            )
    for path, mode in opened:
        try:
            path.chmod(stat.S_IMODE(mode) & ~UMASK)
        except FileNotFoundError:  # it ended meanwhile
            continue
        except PermissionError as error:
            owner = path.stat().st_uid
            hint = f"run as root: chown {os.getuid()} {path}"
            raise BadInput(f"{path}: open to others, and belongs to user {owner}; {hint}") from error
    if not opened:
        return []
    names = ", ".join(str(path.relative_to(site.home)) for path, _ in opened[:NUM_NAMED])
    rest = ", ..." if len(opened) > NUM_NAMED else ""
    return [f"{site.home}: {len(opened)} files and folders were open to other users ({names}{rest}); closed"]


def _modes(site: Site) -> Iterator[tuple[Path, int]]:
    """The home, and all below it but what lies in the store."""
    if not site.home.is_dir():
        return
    for folder, folders, files in os.walk(site.home):
        folder_path = Path(folder)
        try:
            yield folder_path, folder_path.stat().st_mode
        except FileNotFoundError:  # it ended meanwhile
            continue
        if folder_path == site.store:
            folders.clear()
            continue
        for name in files:
            try:
                mode = (folder_path / name).lstat().st_mode
            except FileNotFoundError:  # it ended meanwhile
                continue
            if not stat.S_ISLNK(mode):
                yield folder_path / name, mode
