"""Stage `check`: a base is what its config.json says, and every number of it is finite. Loads no torch.

Names, shapes and types of all tensors, the tokenizer against the vocabulary, then every tensor read once, a piece at a
time. Done once a base, before anything is made of it: NaN would otherwise show as a training that diverges. Spec: the
keys of config.json that are to be ignored (`ignore_config_keys`), where there are any.
"""

from typing import TYPE_CHECKING

from mansard.canonical import canonical_json
from mansard.models.checkpoint import check_snapshot
from mansard.models.structure import check_finite, held_tensors
from mansard.records import SnapshotId

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 1
PACKAGES = ("numpy",)


def run(context: "StageContext") -> SnapshotId:
    store, model = context.store, context.inputs["model"]
    ignored_keys = context.spec.get("ignore_config_keys", [])
    check_snapshot(store, model, ignored_keys)
    tensors = held_tensors(store, model)
    context.progress(0, len(tensors), "tensors", "looking for NaN and infinity")
    check_finite(store, tensors)
    context.progress(len(tensors), len(tensors), "tensors", "sound")
    record = {"format": 1, "finite": True, "tensors": len(tensors)}
    if ignored_keys:
        record["ignored_config_keys"] = ignored_keys
    return store.put_files({"check.json": canonical_json(record)})
