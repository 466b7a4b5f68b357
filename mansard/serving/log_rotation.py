"""No log of a site grows without bound, whoever writes it: routers, host, engines, Prefect, MLflow, stages.

They write to their standard output, so nobody can ask them to open another file: a log above `max_bytes` is copied to
`NAME.1` (the one before goes) and emptied, as logrotate's copytruncate does. Guarantees: a writer that appends (all of
ours do) goes on at the beginning; on a full disk the log is emptied without a copy. Lines written between copy and
emptying are lost. Not covered: how many files there are; access logs, which rotate themselves (router/access_log.py).
"""

import asyncio
import logging
import os
import shutil
from pathlib import Path

MAX_BYTES = 64 * 1024 * 1024
LOOK_SECONDS = 30.0

log = logging.getLogger(__name__)


async def keep_rotating(folder: Path) -> None:
    """Until cancelled."""
    while True:
        await asyncio.to_thread(rotate, folder)
        await asyncio.sleep(LOOK_SECONDS)


def rotate(folder: Path, max_bytes: int = MAX_BYTES) -> list[Path]:
    """The logs below `folder` that were too large."""
    logs = sorted(path for path in folder.rglob("*") if path.suffix in (".log", ".out"))
    large = [path for path in logs if _size_bytes(path) > max_bytes]
    for path in large:
        copy = path.with_name(f"{path.name}.1")
        try:
            shutil.copyfile(path, copy, follow_symlinks=False)
        except OSError as error:
            log.warning("%s: emptied without a copy: %s", path, error.strerror)
            copy.unlink(missing_ok=True)
        os.truncate(path, 0)
    return large


def _size_bytes(path: Path) -> int:
    """On the disk, so that a writer that does not append (its file has a hole) counts for what it takes."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    return min(status.st_size, status.st_blocks * 512) if path.is_file() and not path.is_symlink() else 0
