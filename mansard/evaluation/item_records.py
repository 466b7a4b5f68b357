"""Item records: what one artifact answered on one suite, one canonical JSON object a line, in the suite's order.

No times, so the same engine gives the same bytes: numbers are rounded (bits to 3 decimals, scores to 4), and the chosen
answer follows from the rounded scores, the first one on a tie. Rounding hides what is below it; it cannot make an
engine reproducible whose sums differ by more.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from mansard.canonical import canonical_json
from mansard.errors import StageFailed

Record = dict[str, Any]

BITS_DECIMALS = 3
SCORE_DECIMALS = 4
TEXT_KEPT = 160
"""Characters of a built-in task's question and answer."""


def bits_record(item_id: str, cluster: str, loglikelihood: float, num_bytes: int) -> Record:
    """A text's cost: `loglikelihood` is the natural logarithm of the whole text's probability."""
    bits = round(-loglikelihood / math.log(2), BITS_DECIMALS) + 0.0  # no negative zero
    return {"id": item_id, "cluster": cluster, "bits": bits, "bytes": num_bytes}


def choice_record(
    item_id: str, cluster: str, loglikelihoods: Sequence[float], choices: Sequence[str], answer: int
) -> Record:
    """The chosen option has the highest log-likelihood per UTF-8 byte, so that a short option has no advantage."""
    scores = [
        round(ll / len(choice.encode()), SCORE_DECIMALS) for ll, choice in zip(loglikelihoods, choices, strict=True)
    ]
    chosen = max(range(len(scores)), key=scores.__getitem__)
    return {
        "id": item_id,
        "cluster": cluster,
        "correct": int(chosen == answer),
        "chosen": chosen,
        "answer": answer,
        "options": len(choices),
        "scores": scores,
    }


def right_or_wrong_record(item_id: str, cluster: str, correct: float, options: int, asked: str, said: str) -> Record:
    """An item of a built-in task, scored 0 to 1; `options` is 0 where the answer is free text. `asked` is the end of
    the question and `said` the beginning of the answer, for a reader: the items themselves are not in the store."""
    shown = {"asked": asked[-TEXT_KEPT:], "said": said[:TEXT_KEPT]}
    return {"id": item_id, "cluster": cluster, "correct": correct, "options": options, **shown}


def check_complete(suite: str, records: Sequence[Record], expected_ids: Sequence[str]) -> None:
    """Every item answered once, in order, with finite numbers; else StageFailed."""
    if len(records) != len(expected_ids):
        raise StageFailed(f"suite {suite}: {len(records)} of {len(expected_ids)} items were answered; run it again")
    for record, wanted in zip(records, expected_ids, strict=True):
        if record["id"] != wanted:
            raise StageFailed(f"suite {suite}: the record of item {wanted!r} is that of {record['id']!r}")
        numbers = [v for v in record.values() if isinstance(v, int | float)] + list(record.get("scores", []))
        if not all(math.isfinite(n) for n in numbers):
            raise StageFailed(f"suite {suite}: item {wanted!r} got {numbers}, which is not finite: is the model sound?")


def measure_of(records: Sequence[Record]) -> str:
    """`bits_per_byte` (lower is better) or `accuracy` (higher is better)."""
    return "bits_per_byte" if "bits" in records[0] else "accuracy"


def chance_of(records: Sequence[Record]) -> float:
    """Expected accuracy of a blind guess; 0 where nothing is listed to choose from."""
    return sum(1 / r["options"] if r.get("options") else 0.0 for r in records) / len(records)


def summary_of(suite: str, records: Sequence[Record], engine_version: str) -> dict[str, Any]:
    """The suite's figures, and which engine answered."""
    measure = measure_of(records)
    if measure == "bits_per_byte":
        value = sum(r["bits"] for r in records) / sum(r["bytes"] for r in records)
        more: dict[str, Any] = {"bytes": sum(r["bytes"] for r in records)}
    else:
        value = sum(r["correct"] for r in records) / len(records)
        more = {"chance": round(chance_of(records), 6)}
    return {
        "format": 1,
        "suite": suite,
        "measure": measure,
        "value": round(value, 6),
        "num_items": len(records),
        "num_clusters": len({r["cluster"] for r in records}),
        "engine": {"vllm": engine_version},
        **more,
    }


def to_lines(records: Sequence[Record]) -> bytes:
    return b"".join(canonical_json(r) + b"\n" for r in records)


def parse_lines(data: bytes) -> list[Record]:
    return [json.loads(line) for line in data.split(b"\n") if line]
