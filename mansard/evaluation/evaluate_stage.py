"""Stage `evaluate`: one artifact's answers to one suite, through the engine that serves it.

Inputs: `artifact`, `suite` (a snapshot of suites.take_suite). Spec: {"suite": specs.Suite, "serve": specs.Serve}.
Where: {"endpoint", "served_name"}. Makes records.jsonl and summary.json. Several requests in one worker share the
harness and, where they follow each other on one engine, its tokenizer.
"""

import json
import os
from typing import TYPE_CHECKING

from mansard.canonical import canonical_json
from mansard.errors import StageFailed
from mansard.evaluation.engine_api import check_serves
from mansard.evaluation.item_records import Record, check_complete, summary_of, to_lines
from mansard.evaluation.suites import parse_items
from mansard.records import SnapshotId
from mansard.specs.judging import Suite
from mansard.specs.whole import Serve

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 3
PACKAGES = ("lm-eval", "transformers", "tokenizers", "datasets")


def run(context: "StageContext") -> SnapshotId:
    suite = Suite.model_validate(context.spec["suite"])
    serve = Serve.model_validate(context.spec["serve"])
    endpoint, served_name = context.where["endpoint"], context.where["served_name"]
    artifact = context.inputs["artifact"]
    _check_suite(context, suite)
    engine_version = check_serves(endpoint, served_name, artifact, serve.max_model_len)
    records = _answer(context, suite, endpoint, served_name, serve.max_model_len)
    files = {
        "records.jsonl": to_lines(records),
        "summary.json": canonical_json(summary_of(suite.name, records, engine_version)) + b"\n",
    }
    return context.store.put_files(files)


def _check_suite(context: "StageContext", suite: Suite) -> None:
    described = json.loads(context.store.read_file(context.inputs["suite"], "suite.json"))
    for key, wanted in (("name", suite.name), ("kind", suite.kind), ("task", suite.task), ("limit", suite.limit)):
        if described[key] != wanted:
            raise StageFailed(f"the suite's snapshot has {key} {described[key]!r}, the spec has {wanted!r}")


def _answer(context: "StageContext", suite: Suite, endpoint: str, served_name: str, max_model_len: int) -> list[Record]:
    # Read at import time, so set before; a site's own HF_HOME (a shared cache of task data) is kept.
    os.environ.setdefault("HF_HOME", str(context.work / "huggingface"))
    os.environ["TQDM_DISABLE"] = "1"
    from mansard.evaluation import runner

    tokenizer = context.store.materialize(context.inputs["artifact"])
    model = runner.open_model(runner.Engine(endpoint, served_name, tokenizer, max_model_len))
    model.report = lambda done, total: context.progress(done, total, "prompts", suite.name)
    if suite.task is not None:
        records = runner.answer_task(model, suite.task, suite.limit)
        check_complete(suite.name, records, [r["id"] for r in records])
        return records
    items = parse_items(context.store.read_file(context.inputs["suite"], "items.jsonl"))
    answer = runner.answer_texts if suite.kind == "bits_per_byte" else runner.answer_choices
    records = answer(model, suite.name, items)
    check_complete(suite.name, records, [i["id"] for i in items])
    return records
