"""Follows the journal for the host: imports emergency entries, signs the tip, writes down what a rollback needs while
the database is down, records a people section that changed, and tells people what they must hear of.

A thread with a connection of its own, so that a database that hangs holds up nothing that serves. Guarantees: a tip is
signed only for a journal that still holds the tip signed before; otherwise that one stays and the trouble is logged.
"""

import json
import logging
import threading
from pathlib import Path
from types import TracebackType

from mansard.canonical import write_atomically
from mansard.errors import BadInput, Corrupt, MansardError
from mansard.release import emergency
from mansard.release.ballast import keep_ballast
from mansard.release.journal import Journal
from mansard.release.memory import remember
from mansard.release.notify import notify
from mansard.release.people import record_people
from mansard.release.tip import HOST, Tip, read_tip, sign_tip, write_tip
from mansard.serving.host.notices import notice_of
from mansard.site import Site, load_site

LOOK_SECONDS = 0.25
JOIN_SECONDS = 30.0

log = logging.getLogger(__name__)


class JournalWatch:
    """Runs between `with` and its end. `look` is one turn; what it raises is logged once, and the next turn tries."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal watch", daemon=True)
        self._tip: Tip | None = None
        self._site_data = b""
        self._remembered = 0
        self._notified: int | None = None
        self._said: set[str] = set()

    def __enter__(self) -> "JournalWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(JOIN_SECONDS)

    def look(self, journal: Journal) -> None:
        """One turn: what makes entries comes first."""
        for entry in emergency.import_waiting(self._site, journal):
            log.error("entry %d, an emergency in conflict: %s", entry.sequence, entry.body["facts"]["conflict"])
        try:
            self._record_people(journal)
        except BadInput as error:  # half edited, or a key is still to be made; the tip does not wait for that
            self._say(str(error))
        keep_ballast(self._site)
        self._sign_tip(journal)
        self._tell(journal)

    def _tell(self, journal: Journal) -> None:
        """Call the site's program for entries since the last one told; `run/notified.json` outlives the host."""
        told = self._site.run / "notified.json"
        tip = journal.tip()
        if tip is None or not self._site.notify:
            return
        if self._notified is None:
            self._notified = _read_sequence(told)
        if self._notified is None:  # a site that begins to notify does not tell its whole past
            self._notified = tip.sequence
            write_atomically(told, json.dumps({"format": 1, "sequence": tip.sequence}).encode())
        for entry in journal.entries(after=self._notified) if tip.sequence > self._notified else ():
            notice = notice_of(entry)
            trouble = "" if notice is None else notify(self._site, **notice)
            if trouble:
                self._say(trouble)
            self._notified = entry.sequence
            write_atomically(told, json.dumps({"format": 1, "sequence": entry.sequence}).encode())

    def _say(self, trouble: str) -> None:
        """Once, however often it comes again."""
        if trouble not in self._said:
            log.error("%s", trouble)
            self._said.add(trouble)

    def _record_people(self, journal: Journal) -> None:
        data = self._site.path.read_bytes()
        if data != self._site_data:
            record_people(load_site(self._site.path), journal, HOST)
            self._site_data = data

    def _sign_tip(self, journal: Journal) -> None:
        entry = journal.tip()
        known = self._tip or read_tip(self._site.tip_file)
        if known is not None:
            before = journal.entry(known.sequence)
            if before is None or before.digest != known.digest:
                raise Corrupt(
                    f"journal {journal.name}: entry {known.sequence}, of which the host signed the tip at {known.at}, "
                    "is gone or another: no newer tip is signed; look with: mansard verify --journal"
                )
        if entry is not None and (known is None or entry.sequence > known.sequence):
            known = sign_tip(self._site, entry)
            write_tip(self._site, known)
        if entry is not None and entry.sequence != self._remembered:
            remember(self._site, journal)
            self._remembered = entry.sequence
        self._tip = known

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with Journal.open(self._site.journal) as journal:
                    while not self._stop.is_set():
                        self.look(journal)
                        self._stop.wait(LOOK_SECONDS)
            except (MansardError, OSError) as error:  # down, written anew, a full disk
                self._say(str(error))
                self._stop.wait(4 * LOOK_SECONDS)


def _read_sequence(path: Path) -> int | None:
    """Up to which entry people were told; None where that is not known."""
    try:
        return int(json.loads(path.read_bytes())["sequence"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
