"""The access log: one JSON line for each request, handed to the disk beside the hot path.

Guarantees: it never holds more than MAX_WAITING lines; at MAX_BYTES the file moves to `.1` (the one before goes), so
the disk is not filled; what a full disk refuses is counted, not waited for. It holds no key, no prompt and no answer; a
user is the digest of the sticky key. Not covered: the last FLUSH_SECONDS before a kill -9.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 0.5
MAX_WAITING = 20_000
MAX_BYTES = 64 * 1024 * 1024

log = logging.getLogger(__name__)


class AccessLog:
    """One worker's file. `flush` is called by its owner every FLUSH_SECONDS and at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = 0
        self._lines: list[str] = []
        self._problem = ""
        self._encode = json.JSONEncoder(separators=(",", ":")).encode

    def add(self, seconds: float, line: dict[str, Any]) -> None:
        """`seconds` is when, since 1970; it is written first, in ISO 8601, UTC."""
        if len(self._lines) >= MAX_WAITING:
            self.lost += 1
            return
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        self._lines.append(f'{{"time":"{when}.{int(seconds % 1 * 1000):03d}Z",{self._encode(line)[1:]}\n')

    def flush(self) -> None:
        """Write what waits. A file that cannot be written costs these lines and one line of the worker's own log."""
        if not self._lines:
            return
        lines, self._lines = self._lines, []
        text = "".join(lines).encode()
        try:
            if self._write(text) > MAX_BYTES:
                self.path.replace(self.path.with_name(f"{self.path.name}.1"))
            self._problem = ""
        except OSError as error:
            self.lost += len(lines)
            if self._problem != str(error):
                self._problem = str(error)
                log.warning("%s: %d lines lost: %s", self.path, len(lines), error.strerror)

    def _write(self, text: bytes) -> int:
        """The file's size after it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            if os.write(descriptor, text) < len(text):
                raise OSError(0, "the disk took only a part")
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
