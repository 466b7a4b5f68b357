"""What an engine's log says to a person: the lines that matter, on one line."""

import re
from pathlib import Path


def last_words(log: Path) -> str:
    """The first error line, the first exception, and the last three lines, on one line."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in tail(log, 1000).splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if re.search(r"\bERROR\b", line)]
    exceptions = [line for line in lines if re.search(r"(?:^|\] )\s*[\w.]*(?:Error|Exception): \S", line)]
    chosen = dict.fromkeys([*errors[:1], *exceptions[:1], *lines[-3:]])
    return " | ".join(line[:300] for line in chosen) or "it printed nothing"


def tail(log: Path, num_lines: int) -> str:
    """The last lines; nothing where there is no log."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])
    except OSError:
        return ""
