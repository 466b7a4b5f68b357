"""HAProxy's log lines as records: what became of each request, per version and sticky key.

Guarantees: a request that was sent to another server after its own failed before the first byte counts as an error of
the version that failed (the other one that has weight) and as an answer of the one that gave it, as in the router. A
stream's first token is the first byte of its body. HAProxy does not look into bodies, so tokens are bytes in units of
one event (EVENT_BYTES): whoever compares two versions compares bytes. What was in flight when the clock was set has no
time to first token. Not covered: what is in flight (runtime.py).
"""

import json
import time
from dataclasses import dataclass
from typing import Any

from mansard.serving.router.metrics import Observations
from mansard.serving.router.records import Ended
from mansard.serving.split import ModelSplit

EVENT_BYTES = 230
"""One token's event from vLLM 0.32 (measured 2026-11-26). Ratios do not see it; weights do, a little."""
MAX_WAIT_SECONDS = 3600.0
"""Above it the clock was set."""
_MARK_BYTES = len(b"data: [DONE]\n\n")


def take_line(observations: Observations, model: ModelSplit, data: bytes) -> None:
    """Count one line (infra/haproxy/haproxy.cfg gives its form). ValueError or KeyError for another form."""
    line = json.loads(data)
    server, status = str(line["server"]), int(line["status"])
    if not server.startswith("v"):  # HAProxy's own answer: nobody was asked
        observations.refused[status] += 1
        return
    version, key, seconds = int(server[1:]), int(line["user"]) & (2**64 - 1), float(line["ms"]) / 1000
    waited = time.time() - int(line["now"]) / 1e6  # a line may have waited for its reader
    now = observations.clock() - (waited if 0 < waited < MAX_WAIT_SECONDS else 0.0)
    failed, tenant = _failed_before(line, model, version), int(line["tenant"])
    if failed is not None:
        rescued = Ended(now, model.name, failed, key, "error", None, None, seconds, None, tenant)
        observations.add(rescued, "its engine refused the connection, or broke it off before the first byte")
        observations.counts(model.name, failed).rescues += 1
    outcome = _outcome(status, str(line["ended"]))
    problem = f"status {status}, ended {line['ended']}" if outcome == "error" else ""
    times = _times(line)
    if times.first_seconds is not None:
        observations.counts(model.name, version).streamed(times.first_seconds)
    measured = (times.first_seconds, times.token_seconds, seconds, times.output_tokens, tenant)
    observations.add(Ended(now, model.name, version, key, outcome, *measured), problem)


def _outcome(status: int, ended: str) -> str:
    """`ended` is HAProxy's termination state (its manual, 8.5): who ended the session first, and in which phase."""
    if ended.startswith("C"):
        return "cancelled"
    if status >= 500 or ended[:1] in ("S", "s"):
        return "error"
    return "ok" if 200 <= status < 400 else "engine_4xx"


@dataclass(frozen=True, slots=True)
class _Times:
    first_seconds: float | None = None
    token_seconds: float | None = None
    output_tokens: float | None = None


def _times(line: dict[str, Any]) -> _Times:
    """Of an answer that began. The pace is of what came after the body's first piece, which may hold many events."""
    if line["first"] == "-":  # no answer, or HAProxy's own
        return _Times()
    later_bytes = int(line["bytes"]) - int(line["first_bytes"])
    output_tokens = (int(line["first_body_bytes"]) + later_bytes) / EVENT_BYTES
    if line["is_stream"] != "1":
        return _Times(output_tokens=output_tokens)
    begun, first, now = (int(line[name]) / 1e6 for name in ("begun", "first", "now"))
    if not begun <= first <= now:
        return _Times(output_tokens=output_tokens)
    later_tokens = (later_bytes - _MARK_BYTES) / EVENT_BYTES
    token_seconds = (now - first) / later_tokens if later_tokens > 0 and output_tokens > 1 else None
    return _Times(first - begun, token_seconds, output_tokens)


def _failed_before(line: dict[str, Any], model: ModelSplit, version: int) -> int | None:
    """The version that was asked first, where HAProxy went on to another."""
    if not str(line["redispatched"]).startswith("+"):
        return None
    others = [n for n in (model.stable, model.canary) if n is not None and n != version]
    return others[0] if others else None
