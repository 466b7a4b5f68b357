"""The journal's database goes away and comes back, and what a rollback does meanwhile."""

from typing import Any

from mansard.release.direct_rollback import Request, rollback_directly
from mansard.release.events import Pointers
from mansard.release.journal import Journal
from mansard.serving import split as splits
from mansard.serving.host.when_down import follow_pointers
from mansard.site import Site


class Outage:
    """The journal's database, there or not."""

    def __init__(self, site: Site, server: Any) -> None:
        self.site = site
        self._server = server
        self._aside = site.home / "aside"

    def begin(self) -> None:
        if self._server is not None:
            self._server.stop()
            return
        self._aside.mkdir()
        for path in self.site.home.glob("journal.sqlite3*"):
            path.rename(self._aside / path.name)
        (self.site.home / "journal.sqlite3").mkdir()

    def end(self) -> None:
        if self._server is not None:
            self._server.start()
            return
        (self.site.home / "journal.sqlite3").rmdir()
        for path in self._aside.iterdir():
            path.rename(self.site.home / path.name)
        self._aside.rmdir()


def roll_back(site: Site, from_version: int | None = None, to: int | None = None, **more: Any) -> dict[str, Any]:
    request = Request("demo", from_version, to, more.get("hard", False), more.get("who", "otto"), more.get("why", ""))
    dead = more.get("dead", ())
    return rollback_directly(
        site,
        request,
        lambda _, version: version not in dead,
        lambda *where: follow_pointers(site, *where),
        lambda *_: [],
    )


def state(site: Site) -> tuple[Pointers, int, int | None]:
    """Pointers, and stable and canary of the split; the journal is whole and no term is behind the split's."""
    with Journal.open(site.journal) as journal:
        journal.verify()
        pointers, term = journal.pointers("demo"), journal.term()
    split = splits.read_split(site.split_file)
    assert term >= split.term
    return pointers, split.models["demo"].stable, split.models["demo"].canary
