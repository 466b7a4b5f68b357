"""Calls the site's `notify:` program: one JSON object on its standard input, never in the way of what happened.

Guarantees: the program runs in a session of its own, is ended after TIMEOUT_SECONDS, and nobody waits for it; that it
is missing, fails or hangs changes nothing (what it prints is in logs/notify.log). Standard library only.
"""

import json
import subprocess
import tempfile
from typing import Any

from mansard.release.events import as_text, utc_now
from mansard.site import Site

TIMEOUT_SECONDS = 30
FORK_SECONDS = 5.0


def notify(site: Site, event: str, model: str, text: str, **facts: Any) -> str:  # noqa: ANN401 - any JSON value
    """Tell of `event`; `text` is one line for a person. Returns why the program could not be started, or nothing.

    Events: approval_waiting, abort, rollback, outage, outage_over, emergency_conflict, upgrade_failed.
    """
    if not site.notify:
        return ""
    told = {"format": 1, "event": event, "site": str(site.path), "model": model, "text": text, "at": as_text(utc_now())}
    try:
        site.logs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile() as words, (site.logs / "notify.log").open("ab") as log:
            words.write(json.dumps({**told, **facts}).encode() + b"\n")
            words.seek(0)
            # setsid forks and ends at once; `timeout` is the parent that waits for the program.
            limited = ["setsid", "--fork", "timeout", "--kill-after=2", str(TIMEOUT_SECONDS), *site.notify]
            subprocess.run(limited, stdin=words, stdout=log, stderr=log, timeout=FORK_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError, TypeError, ValueError) as error:
        return f"notify: {site.notify[0]} was not started: {error}"
    return ""
