"""HAProxy's log lines as records: what became of each request, per version and sticky key.

Guarantees: a request that was sent to another server after its own failed before the first byte counts as an error of
the version that failed (the other one that has weight) and as an answer of the one that gave it, as in the router. Not
covered: time to first token and per token (HAProxy sees headers, not events: those are the engines' own metrics).
"""

import json
from typing import Any

from mansard.serving.router_metrics import Observations
from mansard.serving.router_records import Ended
from mansard.serving.split import ModelSplit


def take_line(observations: Observations, model: ModelSplit, data: bytes) -> None:
    """Count one line (infra/haproxy/haproxy.cfg gives its form). ValueError or KeyError for another form."""
    line = json.loads(data)
    server, status = str(line["server"]), int(line["status"])
    if not server.startswith("v"):  # HAProxy's own answer: nobody was asked
        observations.refused[status] += 1
        return
    version, key, seconds = int(server[1:]), int(line["user"]) & (2**64 - 1), float(line["ms"]) / 1000
    now = observations.clock()
    failed = _failed_before(line, model, version)
    if failed is not None:
        rescued = Ended(now, model.name, failed, key, "error", None, None, seconds, None)
        observations.add(rescued, "its engine refused the connection, or broke it off before the first byte")
        observations.counts(model.name, failed).rescues += 1
    outcome = _outcome(status, str(line["ended"]))
    problem = f"status {status}, ended {line['ended']}" if outcome == "error" else ""
    observations.add(Ended(now, model.name, version, key, outcome, None, None, seconds, None), problem)


def _outcome(status: int, ended: str) -> str:
    """`ended` is HAProxy's termination state (its manual, 8.5): who ended the session first, and in which phase."""
    if ended.startswith("C"):
        return "cancelled"
    if status >= 500 or ended[:1] in ("S", "s"):
        return "error"
    return "ok" if 200 <= status < 400 else "engine_4xx"


def _failed_before(line: dict[str, Any], model: ModelSplit, version: int) -> int | None:
    """The version that was asked first, where HAProxy went on to another."""
    if not str(line["redispatched"]).startswith("+"):
        return None
    others = [n for n in (model.stable, model.canary) if n is not None and n != version]
    return others[0] if others else None
