"""Stage `fingerprint`: the answers by which an artifact is recognised after each start.

Input: `artifact`. Spec: {"fingerprint": specs.Fingerprint, "serve": specs.Serve}. Where: {"endpoint", "served_name"}.
Makes fingerprint.json. It is taken twice and refused when the two differ: an engine that does not agree with itself
would fail every later check.
"""

from typing import TYPE_CHECKING

from mansard.canonical import canonical_json
from mansard.errors import StageFailed
from mansard.evaluation.engine_api import check_serves
from mansard.evaluation.fingerprint import compare, take
from mansard.records import SnapshotId
from mansard.specs.judging import Fingerprint
from mansard.specs.whole import Serve

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 1
PACKAGES = ()


def run(context: "StageContext") -> SnapshotId:
    asked = Fingerprint.model_validate(context.spec["fingerprint"])
    serve = Serve.model_validate(context.spec["serve"])
    endpoint, served_name = context.where["endpoint"], context.where["served_name"]
    check_serves(endpoint, served_name, context.inputs["artifact"], serve.max_model_len)
    first = take(endpoint, served_name, asked.prompts, asked.tokens)
    context.progress(1, 2, "passes", "fingerprint")
    second = take(endpoint, served_name, asked.prompts, asked.tokens)
    context.progress(2, 2, "passes", "fingerprint")
    differences = compare(first, second, asked.tolerance)
    if differences:
        raise StageFailed(f"the engine does not answer the same twice: {differences[0]}; raise fingerprint.tolerance")
    return context.store.put_files({"fingerprint.json": canonical_json(first.as_json()) + b"\n"})
