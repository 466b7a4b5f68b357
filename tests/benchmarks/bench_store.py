"""The store against `cp`, side by side in one run: a model of 2 GB in the page cache, on one disk.

Each round copies the model with `cp --reflink=never` followed by `sync`, takes it into an empty store, and lays it out
from there; what is read is in the page cache each time. A ratio is `cp`'s median seconds over the store's, so 1 is as
fast as `cp`. `materialize` ends with every byte on the disk and compared with its digest, so its ratio is against `cp`
followed by `sync` too; the one against `cp` alone is printed beside it. Then the unchanged model is taken again, and a
fused model after its base.
The last line is JSON: snapshot_ratio_to_cp, unchanged_seconds, fused_new_bytes_ratio (bytes that the store grew by
over bytes of the new tensors), materialize_ratio_to_cp, and what they were made of.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mansard.models.expand import apply, plan
from mansard.models.families import LLAMA
from mansard.models.fuse import TRAINED_FILE, fuse
from mansard.models.model_files import model_config
from mansard.models.storeys import read_expansion
from mansard.specs.surgery import Expand
from mansard.store.safetensors_header import compose_header, header_prefix
from mansard.store.snapshot import CONFIG_FILE, INDEX_FILE, TensorFile
from mansard.store.store import Store

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
    "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 18, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip
NUM_SHARDS = 4
NEW_BLOCKS = 2
ROUNDS = int(os.environ.get("MANSARD_BENCH_ROUNDS", "5"))


def shape_of(name: str) -> tuple[int, ...]:
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    rows = {"gate_proj": inner, "up_proj": inner, "embed_tokens": CONFIG["vocab_size"], "lm_head": CONFIG["vocab_size"]}
    layer = name.split(".")[-2]
    if "norm" in layer:
        return (hidden,)
    return (rows.get(layer, hidden), inner if layer == "down_proj" else hidden)


def write_tensors(path: Path, names: list[str]) -> None:
    """A safetensors file of random bytes."""
    text, entries = compose_header({"format": "pt"}, {n: ("F16", shape_of(n)) for n in names})
    with path.open("wb") as file:
        file.write(header_prefix(text))
        for entry in entries:
            file.write(os.urandom(entry.size_bytes))


def write_model(folder: Path) -> None:
    folder.mkdir()
    blocks = range(CONFIG["num_hidden_layers"])
    names = [LLAMA.block_tensor(b, n) for b in blocks for n in LLAMA.block_tensors(CONFIG, b)]
    names = ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]
    step = -(-len(names) // NUM_SHARDS)
    shards = {
        f"model-{i + 1:05}-of-{NUM_SHARDS:05}.safetensors": names[i * step : (i + 1) * step] for i in range(NUM_SHARDS)
    }
    for file, inside in shards.items():
        write_tensors(folder / file, inside)
    weight_map = {name: file for file, inside in shards.items() for name in inside}
    total = sum(p.stat().st_size for p in folder.iterdir())
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / CONFIG_FILE).write_text(json.dumps(CONFIG))


def write_fused(base: Path, scratch: Path, target: Path) -> int:
    """The model with new blocks of random bytes, as fuse makes it; the bytes of the new tensors."""
    store = Store(scratch / "store")
    model = store.snapshot(base)
    expansion = apply(store, model, plan(model_config(store, model), Expand(blocks=NEW_BLOCKS)))
    blocks = [b.index for b in read_expansion(store, expansion).new_blocks]
    (scratch / "trained").mkdir()
    names = [LLAMA.block_tensor(b, n) for b in blocks for n in LLAMA.block_tensors(CONFIG, 0)]
    write_tensors(scratch / "trained" / TRAINED_FILE, names)
    trained = store.snapshot(scratch / "trained")
    store.restore(fuse(store, expansion, trained), target)
    file = store.manifest(trained).files[TRAINED_FILE]
    assert isinstance(file, TensorFile)
    return sum(entry.size_bytes for entry in file.entries())


def timed(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def in_page_cache(tree: Path) -> None:
    for path in tree.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def copy(tree: Path, target: Path) -> None:
    subprocess.run(["cp", "--reflink=never", "-r", str(tree), str(target)], check=True)


def copy_and_sync(tree: Path, target: Path) -> None:
    copy(tree, target)
    subprocess.run(["sync"], check=True)


def settled(*gone: Path) -> None:
    """Remove trees, and leave nothing to the disk that the next measurement would pay for."""
    for path in gone:
        shutil.rmtree(path)
    subprocess.run(["sync"], check=True)


def rounds(tree: Path, scratch: Path) -> Iterator[tuple[float, float, float, float]]:
    """Seconds of cp and sync, snapshot, materialize, cp alone."""
    store = Store(scratch / "store")
    for number in range(ROUNDS):
        in_page_cache(tree)
        copied = timed(lambda: copy_and_sync(tree, scratch / "copy"))
        settled(scratch / "copy")
        in_page_cache(tree)
        taken = timed(lambda: store.snapshot(tree))
        subprocess.run(["sync"], check=True)
        in_page_cache(store.root / "objects")
        laid_out = timed(lambda: store.materialize(store.snapshots()[0]))
        settled(store.root)
        in_page_cache(tree)
        unsynced = timed(lambda: copy(tree, scratch / "copy"))
        settled(scratch / "copy")
        print(
            f"round {number + 1}: cp and sync {copied:.2f} s, snapshot {taken:.2f} s, materialize {laid_out:.2f} s, "
            f"cp alone {unsynced:.2f} s",
            flush=True,
        )
        yield copied, taken, laid_out, unsynced


def object_bytes(store: Store) -> int:
    return sum(listed.room_bytes for listed in store.backend.listed(""))


def main() -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("MANSARD_BENCH_DIR")) as folder:
        root = Path(folder)
        base, fused = root / "base", root / "fused"
        write_model(base)
        size_bytes = sum(p.stat().st_size for p in base.iterdir())
        (root / "making").mkdir()
        new_bytes = write_fused(base, root / "making", fused)
        settled(root / "making")
        print(f"a model of {size_bytes / 1e9:.2f} GB, a fused one with {new_bytes / 1e9:.2f} GB more", flush=True)
        copied, taken, laid_out, unsynced = (statistics.median(s) for s in zip(*rounds(base, root), strict=True))
        store = Store(root / "store")
        store.snapshot(base)
        before = object_bytes(store)
        in_page_cache(base)
        unchanged_seconds = timed(lambda: store.snapshot(base))
        unchanged_bytes = object_bytes(store) - before
        in_page_cache(fused)
        fused_seconds = timed(lambda: store.snapshot(fused))
        fused_bytes = object_bytes(store) - before - unchanged_bytes
    print(f"unchanged: {unchanged_bytes} bytes; fused after its base: {fused_bytes:,} bytes in {fused_seconds:.2f} s")
    result = {
        "snapshot_ratio_to_cp": round(copied / taken, 3),
        "unchanged_seconds": round(unchanged_seconds, 3),
        "fused_new_bytes_ratio": round(fused_bytes / new_bytes, 5),
        "materialize_ratio_to_cp": round(copied / laid_out, 3),
        "materialize_ratio_to_cp_without_sync": round(unsynced / laid_out, 3),
        "unchanged_bytes": unchanged_bytes,
        "fused_seconds": round(fused_seconds, 3),
        "snapshot_gb_per_second": round(size_bytes / taken / 1e9, 3),
        "cp_gb_per_second": round(size_bytes / copied / 1e9, 3),
        "rounds": ROUNDS,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
