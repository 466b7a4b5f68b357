"""The tokenizer of a model as a snapshot of its own, so that what is made with it is shared by all models that have it:
a base, its expansion and every version after it. No torch."""

from mansard.canonical import canonical_json
from mansard.errors import BadInput
from mansard.models.model_files import model_config
from mansard.records import SnapshotId
from mansard.store.snapshot import Blob, Manifest
from mansard.store.store import Store

TOKENIZER_FILES = frozenset({
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
})  # fmt: skip
CONFIG_KEYS = ("model_type", "tokenizer_class", "transformers_version")
"""What of config.json decides which tokenizer transformers makes, and how (it mends that of some releases)."""


def take_tokenizer(store: Store, model: SnapshotId) -> SnapshotId:
    """Costs a few hundred bytes: the files are the model's objects. BadInput where it has no tokenizer."""
    files = {name: file for name, file in store.manifest(model).files.items() if name in TOKENIZER_FILES}
    if not files:
        raise BadInput(f"snapshot {model}: no tokenizer beside its weights; tokenizer.json is expected")
    config = model_config(store, model)
    data = canonical_json({key: config[key] for key in CONFIG_KEYS if key in config})
    return store.put_manifest(Manifest({**files, "config.json": Blob(store.put_bytes(data), len(data))}))
