"""The files of a model's snapshot, read and written on the manifest: config.json, weights, index."""

import json
import math
from collections.abc import Mapping
from typing import Any

from mansard.errors import BadInput
from mansard.records import SnapshotId
from mansard.store.snapshot import CONFIG_FILE, INDEX_FILE, Manifest, TensorFile, read_json_object
from mansard.store.store import Store


def model_config(store: Store, model: SnapshotId) -> dict[str, Any]:
    """config.json of a snapshot."""
    return read_json_object(store.read_file(model, CONFIG_FILE), f"snapshot {model}: {CONFIG_FILE}")


def weight_files(manifest: Manifest) -> dict[str, TensorFile]:
    """The safetensors files of the model itself; folders below hold something else."""
    return {p: f for p, f in manifest.files.items() if isinstance(f, TensorFile) and "/" not in p}


def rebuilt_index(index: dict[str, Any], files: Mapping[str, TensorFile]) -> dict[str, Any]:
    """The index with every tensor's file, and the totals where the old one has them."""
    entries = {path: file.entries() for path, file in files.items()}
    metadata = index.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise BadInput(f"{INDEX_FILE}: metadata: {metadata!r:.80}; a mapping is expected")
    metadata = dict(metadata)
    every = [e for found in entries.values() for e in found]
    if "total_size" in metadata:
        metadata["total_size"] = sum(e.size_bytes for e in every)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(e.shape) for e in every)
    names = {e.name: path for path, found in entries.items() for e in found}
    return {**index, "metadata": metadata, "weight_map": dict(sorted(names.items()))}


def pretty_json(tree: dict[str, Any]) -> bytes:
    """JSON as transformers writes it, in the order of the keys that were there."""
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
