"""Stage `contamination`: counts and lists suite items that share 13-grams with training text.

Inputs: suite.NAME for every suite, data.NAME.train for every source. Makes contamination.json. It refuses nothing: the
limit is the spec's and is held against what is found by whoever asked.
"""

from typing import TYPE_CHECKING

from mansard.canonical import canonical_json
from mansard.evaluation.contamination import Index, as_json, texts_of
from mansard.evaluation.suites import parse_items
from mansard.records import SnapshotId
from mansard.store.stream import file_lines

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 2
PACKAGES = ("numpy",)
SUITE, SOURCE, TRAIN = "suite.", "data.", ".train"


def run(context: "StageContext") -> SnapshotId:
    suites = {
        name.removeprefix(SUITE): parse_items(context.store.read_file(snapshot, "items.jsonl"))
        for name, snapshot in context.inputs.items()
        if name.startswith(SUITE)
    }
    index = Index(suites)
    sources = {n.removeprefix(SOURCE).removesuffix(TRAIN): s for n, s in context.inputs.items() if n.startswith(SOURCE)}
    seen: dict[str, set[int]] = {}
    for number, (source, snapshot) in enumerate(sources.items()):
        context.progress(number, len(sources), "sources", source)
        seen[source] = index.seen_in(texts_of(file_lines(context.store, snapshot, "data.jsonl")))
    context.progress(len(sources), len(sources), "sources")
    return context.store.put_files({"contamination.json": canonical_json(as_json(index.found(seen))) + b"\n"})
