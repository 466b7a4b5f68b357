"""The site's people in the journal: a change of who may do what is an event."""

from mansard.errors import Conflict
from mansard.release.events import PEOPLE_CHANGED
from mansard.release.journal import Journal
from mansard.site import Site

ATTEMPTS = 5


def record_people(site: Site, journal: Journal, who: str) -> None:
    """Journal the people section and the approval policy when they are not the ones recorded last."""
    digest = site.people_digest()
    for attempt in range(1, ATTEMPTS + 1):
        tip = journal.tip()
        known = journal.entries(kinds=(PEOPLE_CHANGED,))
        before = known[-1].body["people_digest"] if known else None
        if before == digest:
            return
        body = {"people_digest": digest, "before": before, **site.people_record()}
        try:
            sequence = None if tip is None else tip.sequence
            journal.append("", PEOPLE_CHANGED, who, site.path.name, body, expected_tip=sequence)
            return
        except Conflict:  # perhaps somebody else has recorded it meanwhile
            if attempt == ATTEMPTS:
                raise
