"""What a rollback needs of the serving side when the host is down: does an engine answer, and write the split.

Standard library only: the on-call commands import it. The split file refuses an older term, so a host that comes back
meanwhile loses nothing. Not covered: starting engines; that is the host's.
"""

import http.client
from urllib.parse import urlsplit

from mansard.errors import Corrupt
from mansard.release.events import Pointers
from mansard.serving.split import Split, read_split, renewed, with_stable, write_split
from mansard.site import Site

ANSWER_TIMEOUT_SECONDS = 15.0
"""A starved machine answers late; only a dead engine must count as dead."""


def engine_answers(site: Site, model: str, version: int) -> bool:
    """Whether the engine that the split names for the version is healthy now."""
    endpoint = _endpoint(_split(site), model, version)
    if endpoint is None:
        return False
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=ANSWER_TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def follow_pointers(site: Site, model: str, pointers: Pointers, term: int) -> None:
    """All traffic to stable, as the journal says; Conflict where the file is newer. Repeatable."""
    if pointers.stable is None:
        return
    split = _split(site)
    known = split.models.get(model)
    if known is not None and (known.stable, known.canary) == (pointers.stable, None) and split.term >= term:
        return
    endpoint = _endpoint(split, model, pointers.stable)
    write_split(site.split_file, renewed(with_stable(split, model, pointers.stable, endpoint, model, term), model))


def _split(site: Site) -> Split:
    """The file, or nothing where it is damaged: the journal is the truth."""
    try:
        return read_split(site.split_file)
    except Corrupt:
        return Split()


def _endpoint(split: Split, model: str, version: int) -> str | None:
    known = split.models.get(model)
    return known.versions[version].endpoint if known is not None and version in known.versions else None
