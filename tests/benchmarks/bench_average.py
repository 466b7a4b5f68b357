"""What fusion by average keeps, on the demo's upgrade: its base, its text, its storey, trained as configs/upgrade says.

For each weight of the new blocks: `kept_share`, (averaged - base) / (expanded - base), on held-out code and on the
target suite, and `guard_loss`, averaged - base in bits per byte, on held-out docstrings and the guard suite; all
unquantized, by stage `kept-gain`. Beside them what the expanded model gained and lost. Prints one JSON line last.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from flows.demo import BASE, CORPUS
from mansard.api import Model, Text, _derive, expand, fuse, train
from mansard.specs.whole import UpgradeSpec
from mansard.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = (0.5, 0.1)
TEXTS = {
    "data.code.held_out": ("code.held-out.jsonl", "data.jsonl"),
    "suite.code-bits": ("code-bits.jsonl", "items.jsonl"),
    "data.docstrings.held_out": ("docstrings.held-out.jsonl", "data.jsonl"),
    "suite.docstrings-bits": ("docstrings-bits.jsonl", "items.jsonl"),
}


def main() -> int:
    spec = UpgradeSpec.model_validate(yaml.safe_load((ROOT / "configs/upgrade/demo.yaml").read_text()))
    with tempfile.TemporaryDirectory() as folder:
        model, texts = upgraded(Path(folder), spec)
        found = {f"{weight:g}": averaged(model, spec, texts, weight) for weight in WEIGHTS}
    first = found[f"{WEIGHTS[0]:g}"]["texts"]
    report: dict[str, Any] = {
        "base_to_expanded": {name: [text["base"], text["expanded"]] for name, text in first.items()},
        "averaged": {w: {n: t["averaged"] for n, t in f["texts"].items()} for w, f in found.items()},
        "kept_share": {w: _each(f, "kept_share") for w, f in found.items()},
        "guard_loss": {w: _each(f, "loss") for w, f in found.items()},
        "changed_base_tensors": len(found[f"{WEIGHTS[0]:g}"]["changed_base_tensors"]),
    }
    print(json.dumps(report))
    return 0


def upgraded(folder: Path, spec: UpgradeSpec) -> tuple[Model, dict[str, str]]:
    """The demo's upgrade, fused, and the texts to measure on; every stage in this process."""
    store = Store(folder / "store")
    corpus = _derive(store, "corpus", {}, {**CORPUS, "python": platform.python_version()})
    base = _derive(store, "pretrain", {"corpus": corpus}, BASE)
    for snapshot, name in ((corpus, "corpus"), (base, "base")):
        store.restore(snapshot, folder / name)
    text = folder / "corpus"
    sources = [
        Text(s.name, text / f"{s.name}.train.jsonl", s.weight, s.is_domain, text / f"{s.name}.held-out.jsonl")
        for s in spec.data.sources
    ]
    settings = spec.train.model_dump(exclude={"tokens", "batch_sequences", "learning_rates"})
    trained = train(
        expand(folder / "base", spec.expand.blocks, spec.expand.positions, folder),
        sources,
        spec.train.tokens,
        spec.train.learning_rates.new_blocks,
        spec.data.sequence_tokens,
        spec.train.batch_sequences,
        **settings,
    )
    texts = {name: store.put_files({held: store.read_file(corpus, file)}) for name, (file, held) in TEXTS.items()}
    return fuse(trained), texts


def averaged(model: Model, spec: UpgradeSpec, texts: dict[str, str], weight: float) -> dict[str, Any]:
    """The fusion.json of one weight."""
    store = model.store
    made = _derive(store, "average", {"model": model.snapshot}, {"weight": weight})
    names = list(texts)
    wish = {
        "weight": weight,
        "sequence_tokens": spec.data.sequence_tokens,
        "gains": [n for n in names if "code" in n],
        "guards": [n for n in names if "code" not in n],
    }
    models = {"base": model.base, "expanded": model.snapshot, "averaged": made}
    kept = _derive(store, "kept-gain", {**models, **texts}, wish)
    found: dict[str, Any] = json.loads(store.read_file(kept, "fusion.json"))
    return found


def _each(fusion: dict[str, Any], key: str) -> dict[str, float]:
    return {name: round(text[key], 4) for name, text in fusion["texts"].items() if text.get(key) is not None}


if __name__ == "__main__":
    sys.exit(main())
