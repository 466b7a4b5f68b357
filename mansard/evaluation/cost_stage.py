"""Stage `cost`: latency and memory of the candidate and, where there is one, of the version in service.

Inputs: `artifact`, `baseline` (absent at `adopt`). Spec: {"cost": specs.Cost, "serve": specs.Serve}. Where:
{"endpoint", "served_name"}, with a baseline {"baseline_endpoint"}, and where memory is wanted the engines' {"pid",
"baseline_pid"}.
Makes cost.json. A measurement: another run gives other figures, the store keeps the first.
"""

import json
from typing import TYPE_CHECKING, Any

from mansard.canonical import canonical_json
from mansard.errors import BadInput
from mansard.evaluation.cost import Target, measure, plan_rounds
from mansard.evaluation.engine_api import check_serves
from mansard.records import SnapshotId
from mansard.specs.judging import Cost
from mansard.specs.whole import Serve

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 2
PACKAGES = ("numpy", "scipy")


def run(context: "StageContext") -> SnapshotId:
    cost = Cost.model_validate(context.spec["cost"])
    serve = Serve.model_validate(context.spec["serve"])
    if cost.prompt_tokens + cost.output_tokens > serve.max_model_len:
        raise BadInput(
            f"cost: prompt_tokens {cost.prompt_tokens} and output_tokens {cost.output_tokens} together must fit in "
            f"serve.max_model_len {serve.max_model_len}"
        )
    targets = _targets(context, serve.max_model_len)
    vocabulary = min(_vocabulary(context, name) for name in context.inputs)
    found: dict[str, Any] = measure(
        targets,
        plan_rounds(cost.prompts, cost.prompt_tokens, vocabulary),
        cost.concurrency,
        cost.output_tokens,
        lambda done, total: context.progress(done, total, "requests", "cost"),
    )
    return context.store.put_files({"cost.json": canonical_json({"format": 1, **cost.model_dump(), **found}) + b"\n"})


def _targets(context: "StageContext", max_model_len: int) -> dict[str, Target]:
    where, name = context.where, context.where["served_name"]
    targets = {"candidate": Target(where["endpoint"], name, where.get("pid"))}
    check_serves(where["endpoint"], name, context.inputs["artifact"], max_model_len)
    if "baseline" in context.inputs:
        targets["baseline"] = Target(where["baseline_endpoint"], name, where.get("baseline_pid"))
        check_serves(where["baseline_endpoint"], name, context.inputs["baseline"])
    return targets


def _vocabulary(context: "StageContext", name: str) -> int:
    config = json.loads(context.store.read_file(context.inputs[name], "config.json"))
    return int(config.get("text_config", config)["vocab_size"])
