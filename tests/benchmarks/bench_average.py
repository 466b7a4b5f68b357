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
from mansard.api import _derive
from mansard.specs import UpgradeSpec
from mansard.store import Store

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
        store = Store(Path(folder) / "store")
        models, texts = upgraded(store, spec)
        found = {f"{weight:g}": averaged(store, spec, models, texts, weight) for weight in WEIGHTS}
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


def upgraded(store: Store, spec: UpgradeSpec) -> tuple[dict[str, str], dict[str, str]]:
    """The demo's base and expanded model, and the texts; each stage in this process."""
    corpus = _derive(store, "corpus", {}, {**CORPUS, "python": platform.python_version()})
    base = _derive(store, "pretrain", {"corpus": corpus}, BASE)
    expand = spec.expand.model_dump(mode="json", exclude={"probe"})
    expansion = _derive(store, "expand", {"model": base}, expand)
    texts = {n: store.put_files({held: store.read_file(corpus, file)}) for n, (file, held) in TEXTS.items()}
    inputs = {"expansion": expansion}
    for source in spec.data.sources:
        for part in ("train", "held_out"):
            file = Path(getattr(source, part)).name
            inputs[f"data.{source.name}.{part}"] = store.put_files({"data.jsonl": store.read_file(corpus, file)})
    sections = {"data": spec.data.model_dump(mode="json"), "train": spec.train.model_dump(mode="json")}
    trained = _derive(store, "train", inputs, sections)
    fused = _derive(store, "fuse", {"expansion": expansion, "trained": trained}, {"method": "residual"})
    return {"base": base, "expanded": fused}, texts


def averaged(
    store: Store, spec: UpgradeSpec, models: dict[str, str], texts: dict[str, str], weight: float
) -> dict[str, Any]:
    """The fusion.json of one weight."""
    made = _derive(store, "average", {"model": models["expanded"]}, {"weight": weight})
    names = list(texts)
    wish = {
        "weight": weight,
        "sequence_tokens": spec.data.sequence_tokens,
        "gains": [n for n in names if "code" in n],
        "guards": [n for n in names if "code" not in n],
    }
    kept = _derive(store, "kept-gain", {**models, "averaged": made, **texts}, wish)
    found: dict[str, Any] = json.loads(store.read_file(kept, "fusion.json"))
    return found


def _each(fusion: dict[str, Any], key: str) -> dict[str, float]:
    return {name: round(text[key], 4) for name, text in fusion["texts"].items() if text.get(key) is not None}


if __name__ == "__main__":
    sys.exit(main())
