"""`python -m tasks.mirror --site FILE`: keeps MLflow's registry as the journal says, alone.

It looks at the journal every second and at MLflow itself every minute, so that what somebody changed there by hand is
mended, and it takes the host's signed tip there. MLflow and the journal's database may be down for any time: the mirror
waits, and says how far behind it is in `run/mirror.json` ({"format", "sequence", "behind", "at", "trouble"}), which is
rewritten at least every ten seconds.
"""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient

from mansard.canonical import write_atomically
from mansard.errors import JournalDown, MansardError
from mansard.release.journal import Journal
from mansard.release.tip import read_tip
from mansard.site import Site, load_site
from tasks import registry
from tasks.standard_streams import say
from tasks.tracking import mlflow_errors

LOOK_SECONDS = 1.0
MEND_SECONDS = 60.0
SIGN_OF_LIFE_SECONDS = 10.0


class Mirror:
    """`sequence` is the newest entry that MLflow shows; 0 until the first look, so that a start mends everything."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._sequence = 0
        self._signed = 0
        self._mended_at = -MEND_SECONDS
        self._told: tuple[int, int, str] | None = None
        self._told_at = -SIGN_OF_LIFE_SECONDS

    def look(self, journal: Journal) -> None:
        """Bring MLflow up to the journal's tip where it is behind or unchecked for long, and write the lag."""
        tip = journal.tip()
        newest = 0 if tip is None else tip.sequence
        trouble = ""
        signed = self._signed_tip()
        is_due = time.monotonic() - self._mended_at >= MEND_SECONDS
        if newest > self._sequence or signed != self._signed or is_due:
            try:
                reconcile(self._site, journal)
            except MansardError as error:
                trouble = str(error)
            else:
                self._sequence, self._mended_at, self._signed = newest, time.monotonic(), signed
        self._write_lag(newest, trouble)

    def _signed_tip(self) -> int:
        """When the host's tip file was written; 0 without one."""
        try:
            return self._site.tip_file.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def tell(self, trouble: str) -> None:
        """Write that the journal itself could not be read."""
        self._write_lag(self._sequence, trouble)

    def _write_lag(self, newest: int, trouble: str) -> None:
        state = (self._sequence, newest - self._sequence, trouble)
        now = time.monotonic()
        if state == self._told and now - self._told_at < SIGN_OF_LIFE_SECONDS:
            return
        if trouble and (self._told is None or self._told[2] != trouble):
            say(trouble)
        lag = {
            "format": 1,
            "sequence": state[0],
            "behind": state[1],
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "trouble": trouble,
        }
        write_atomically(self._site.run / "mirror.json", json.dumps(lag).encode())
        self._told, self._told_at = state, now


def reconcile(site: Site, journal: Journal) -> int:
    """Make MLflow list every model of the site as the journal does; returns how many changes that took."""
    num_changes = 0
    with mlflow_errors():
        client = MlflowClient()
        for model in site.models:
            found, numbers = registry.listed(client, model)
            changes = registry.plan(registry.wanted(journal, model), found)
            registry.apply(client, model, changes, numbers, site.store_uri)
            num_changes += len(changes)
        tip = read_tip(site.tip_file)
        if tip is not None:
            for model in site.models:
                registry.publish_tip(client, model, tip)
    return num_changes


def run(site: Site, stop: threading.Event) -> None:
    """Mirror until `stop` is set."""
    mirror = Mirror(site)
    while not stop.is_set():
        try:
            with Journal.open(site.journal) as journal:
                while not stop.is_set():
                    mirror.look(journal)
                    stop.wait(LOOK_SECONDS)
        except JournalDown as error:  # MLflow stays as it is until there is a journal to follow
            mirror.tell(str(error))
            stop.wait(LOOK_SECONDS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.mirror", description=__doc__)
    parser.add_argument("--site", required=True, type=Path)
    site = load_site(parser.parse_args(arguments).site)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    run(site, stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
