"""What a rollback needs of the serving side when the host is down: ask an engine, write the split, end an engine.

Standard library only: the on-call commands import it. The split file refuses an older term, so a host that comes back
meanwhile loses nothing. An engine is ended by the record that the host left of it (engine/engine.py), never by its port
or pid alone. Not covered: starting engines; that is the host's.
"""

import http.client
import json
from urllib.parse import urlsplit

from mansard.errors import Corrupt
from mansard.release.events import Pointers
from mansard.serving.split import Split, read_split, renewed, with_stable, without_canary, write_split
from mansard.site import Site

ANSWER_TIMEOUT_SECONDS = 15.0
"""A starved machine answers late; only a dead engine must count as dead."""


def engine_answers(site: Site, model: str, version: int) -> bool:
    """Whether the engine that the split names for the version is healthy now."""
    endpoint = _endpoint(traffic_split(site), model, version)
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
    """All traffic to stable, as the journal says, or to the version that stands in for it; Conflict where the file is
    newer. Repeatable."""
    if pointers.stable is None:
        return
    split = traffic_split(site)
    known = split.models.get(model)
    if known is not None and known.journal_stable == pointers.stable:
        if known.canary is None and split.term >= term:
            return
        if known.stands_in_for is not None:
            write_split(site.split_file, renewed(without_canary(split, model, term), model))
            return
    endpoint = _endpoint(split, model, pointers.stable)
    known_version = None if known is None else known.versions.get(pointers.stable)
    name = model if known_version is None else known_version.served_name
    write_split(site.split_file, renewed(with_stable(split, model, pointers.stable, endpoint, name, term), model))


def end_engine(site: Site, before: Split, model: str, left: int, stable: int | None) -> list[str]:
    """Kill the engine that `before` names for the version left: routers tell its streams, and ask stable for the rest.

    Nothing happens to an engine that stable has, too, or another model's users. Returns what hindered it.
    """
    from mansard.serving.process import ProcessIdentity, kill_group  # asyncio is loaded only where an engine ends

    endpoint = _endpoint(before, model, left)
    needed = {_endpoint(before, m.name, n) for m in before.models.values() for n in (m.stable, m.canary)
              if n is not None and (m.name, n) != (model, left)}  # fmt: skip
    if endpoint is None or endpoint in needed or (stable is not None and endpoint == _endpoint(before, model, stable)):
        return []
    port = urlsplit(endpoint).port
    for file in sorted((site.run / "engines").glob("*.json")):
        try:
            record = json.loads(file.read_bytes())
            if record["port"] == port:
                kill_group(ProcessIdentity(**record["process"]))
                return []
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half a record; the host finds its process as an orphan
    return [f"version {left}: {site.run / 'engines'} has no record of its engine at {endpoint}: its answers go on"]


def traffic_split(site: Site) -> Split:
    """The file, or nothing where it is damaged: the journal is the truth."""
    try:
        return read_split(site.split_file)
    except Corrupt:
        return Split()


def _endpoint(split: Split, model: str, version: int) -> str | None:
    known = split.models.get(model)
    return known.versions[version].endpoint if known is not None and version in known.versions else None
