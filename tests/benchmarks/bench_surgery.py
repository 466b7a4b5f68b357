"""Expansion (20 blocks) and fusion of a checkpoint of Llama-2-70B's shape: milliseconds, memory, tensor bytes read.

The tensors are sparse files of the real sizes under made-up digests, so the benchmark needs little disk; sizes, names,
headers and shards are the real model's. Reads are counted by an audit hook that sees every file this process opens.
The last line is JSON: expand_ms, fuse_ms, peak_mb (of the whole process), tensor_bytes_read.
"""

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mansard.digest import digest_bytes
from mansard.models.expand import apply, plan
from mansard.models.families import LLAMA
from mansard.models.fuse import TRAINED_FILE, fuse
from mansard.models.model_files import model_config
from mansard.models.storeys import read_expansion
from mansard.records import SnapshotId
from mansard.specs.surgery import Expand
from mansard.store.safetensors_header import compose_header, header_prefix
from mansard.store.snapshot import CONFIG_FILE, INDEX_FILE, Blob, Manifest, TensorFile
from mansard.store.store import Store

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip
SHARD_BYTES = 10 * 10**9
NEW_BLOCKS = 20


def shape_of(name: str) -> tuple[int, ...]:
    hidden, key_value = CONFIG["hidden_size"], CONFIG["hidden_size"] // 8
    rows = {
        "k_proj": key_value, "v_proj": key_value, "gate_proj": CONFIG["intermediate_size"],
        "up_proj": CONFIG["intermediate_size"], "embed_tokens": CONFIG["vocab_size"], "lm_head": CONFIG["vocab_size"],
    }  # fmt: skip
    layer = name.split(".")[-2]
    if "norm" in layer:
        return (hidden,)
    return (rows.get(layer, hidden), CONFIG["intermediate_size"] if layer == "down_proj" else hidden)


def sparse_object(store: Store, size_bytes: int, seed: str) -> str:
    """An object of the real size under a made-up digest."""
    digest = digest_bytes(seed.encode())
    path = store.root / "objects" / digest[:2] / digest
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return digest


def tensor_file(store: Store, names: list[str], seed: str) -> TensorFile:
    text, entries = compose_header({"format": "pt"}, {n: ("F16", shape_of(n)) for n in names})
    tensors = {e.name: sparse_object(store, e.size_bytes, seed + e.name) for e in entries}
    return TensorFile(text, tensors, len(header_prefix(text)) + sum(e.size_bytes for e in entries))


def shards() -> Iterator[list[str]]:
    """The names of the model's tensors, cut into files of at most SHARD_BYTES as transformers does."""
    blocks = range(CONFIG["num_hidden_layers"])
    names = [LLAMA.block_tensor(b, n) for b in blocks for n in LLAMA.block_tensors(CONFIG, b)]
    shard: list[str] = []
    room = SHARD_BYTES
    for name in ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]:
        size = 2
        for length in shape_of(name):
            size *= length
        if size > room:
            yield shard
            shard, room = [], SHARD_BYTES
        shard.append(name)
        room -= size
    yield shard


def put_model(store: Store) -> SnapshotId:
    parts = list(shards())
    files: dict[str, Blob | TensorFile] = {
        f"model-{i:05}-of-{len(parts):05}.safetensors": tensor_file(store, names, "base")
        for i, names in enumerate(parts, start=1)
    }
    weight_map = {name: path for path, file in files.items() if isinstance(file, TensorFile) for name in file.tensors}
    total = sum(f.size_bytes for f in files.values())
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}).encode()
    config = json.dumps(CONFIG).encode()
    files[INDEX_FILE] = Blob(store.put_bytes(index), len(index))
    files[CONFIG_FILE] = Blob(store.put_bytes(config), len(config))
    return store.put_manifest(Manifest(files))


def put_trained(store: Store, expansion: SnapshotId) -> SnapshotId:
    blocks = [b.index for b in read_expansion(store, expansion).new_blocks]
    names = [LLAMA.block_tensor(b, n) for b in blocks for n in LLAMA.block_tensors(CONFIG, 0)]
    return store.put_manifest(Manifest({TRAINED_FILE: tensor_file(store, names, "trained")}))


def timed(act: Callable[[], SnapshotId]) -> tuple[SnapshotId, float]:
    begun = time.perf_counter()
    made = act()
    return made, (time.perf_counter() - begun) * 1000


def peak_bytes() -> int:
    """The most memory this process held; getrusage would count what its parent held before exec."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    opened: list[str] = []
    sys.addaudithook(lambda event, values: opened.append(str(values[0])) if event == "open" else None)
    with tempfile.TemporaryDirectory(dir=os.environ.get("MANSARD_BENCH_DIR")) as folder:
        store = Store(Path(folder))
        base = put_model(store)
        manifest = store.manifest(base)
        print(f"a model of {manifest.size_bytes / 1e9:.1f} GB in {len(manifest.files) - 2} files", flush=True)
        opened.clear()
        expansion, expand_ms = timed(
            lambda: apply(store, base, plan(model_config(store, base), Expand(blocks=NEW_BLOCKS)))
        )
        read = list(opened)
        print(f"expanded by {NEW_BLOCKS} blocks in {expand_ms:.0f} ms", flush=True)
        trained = put_trained(store, expansion)
        opened.clear()
        fused, fuse_ms = timed(lambda: fuse(store, expansion, trained))
        read += opened
        print(f"fused in {fuse_ms:.0f} ms", flush=True)
        listed = [entry for s in (base, expansion, trained, fused) for entry in store.manifest(s).objects()]
        sizes = {digest: size for _, tensor, digest, size in listed if tensor is not None}
    result = {
        "expand_ms": round(expand_ms, 1),
        "fuse_ms": round(fuse_ms, 1),
        "peak_mb": round(peak_bytes() / 1e6, 1),
        "tensor_bytes_read": sum(sizes.get(Path(path).name, 0) for path in read),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
