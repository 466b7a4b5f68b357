"""Stage `capture`: the states of a base as served, of every sequence of the training and held-out text, once.

Inputs: `artifact` (the base), `data.NAME.train`, `data.NAME.held_out`. Spec: {"data", "scheme", "serve", "engine",
"rows": {NAME: {"train", "held_out"}}} (how many packed rows of each text are taken, from its beginning), and "taps"
where the states after some layers are taken beside the final one.
Where: {"nodes": [{"endpoint", "served_name", "kind", "quantization"}]} or {"start": ...} (see pooling_engine), and
{"salvage": snapshot} of an earlier capture of the same recipe that was damaged. Makes shards, the packed rows, and
capture.json. A killed capture goes on with the shards that are whole.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from mansard.canonical import canonical_json
from mansard.carry_on.cached import CAPTURE_FILE
from mansard.carry_on.filling import fill
from mansard.carry_on.nodes import Node, NodeFailed, check_agreement
from mansard.carry_on.pooling_engine import pooling_engine
from mansard.carry_on.same_quantization import check_quantization, quantization_of
from mansard.carry_on.same_tokens import check_tokens
from mansard.carry_on.sequences import distinct
from mansard.carry_on.serving_node import ServingNode, node_of
from mansard.carry_on.shards import Shard, check_room, expected_bytes, plan_shards
from mansard.carry_on.wire import check_scheme
from mansard.composition.tapping import check_taps, serving_config, tapped_config
from mansard.errors import BadInput, Corrupt, StageFailed
from mansard.models.loading import load_tokenizer
from mansard.models.model_files import model_config
from mansard.models.vocabulary import end_of
from mansard.records import SnapshotId
from mansard.specs.data import Data
from mansard.store.stream import file_chunks
from mansard.training.data import Packed, each_text, require_rows
from mansard.training.packing import first_rows
from mansard.training.tokens import tokenized

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 3
PACKAGES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")


def run(context: "StageContext") -> SnapshotId:
    torch.set_num_threads(1)  # the threads that fetch code, each for itself
    spec = context.spec
    check_scheme(spec["scheme"])
    data = Data.model_validate(spec["data"])
    folder = context.work / "cache"
    folder.mkdir(exist_ok=True)
    with context.store.using(context.inputs["artifact"]) as tree:
        tokenizer = load_tokenizer(tree)
        texts = read_packed(context, data, tokenizer)
        sequences = distinct([packed for parts in texts.values() for packed in parts.values()])
        shards = plan_shards(sequences)
        _salvage(context, folder, shards)
        missing = [shard for shard in shards if not shard.is_whole(folder)]
        taps, width = spec.get("taps", []), _width(context)
        check_taps(taps, model_config(context.store, context.inputs["artifact"]))
        size_bytes = expected_bytes(shards, spec["scheme"], width, 1 + len(taps))
        print(_preflight(shards, spec["scheme"], width * (1 + len(taps)), size_bytes), file=sys.stderr, flush=True)
        check_room(expected_bytes(missing, spec["scheme"], width, 1 + len(taps)), folder)
        if missing:
            with _nodes(context, tree) as nodes:
                for node in nodes:
                    check_tokens(node.endpoint, node.served_name, tokenizer, missing[0].sequences[0].tokens.tolist())
                _capture(context, nodes, folder, shards, missing, width)
    _write_rows(folder, texts)
    facts = {
        "format": 1,
        "base": context.inputs["artifact"],
        "scheme": spec["scheme"],
        "width": width,
        **({"taps": taps} if taps else {}),
        "sequences": len(sequences),
        "tokens": sum(shard.tokens for shard in shards),
        "bytes": size_bytes,
        "sources": {
            name: {part: {"bytes_per_token": packed.bytes_per_token} for part, packed in parts.items()}
            for name, parts in texts.items()
        },
    }
    (folder / CAPTURE_FILE).write_bytes(canonical_json(facts))
    return context.store.snapshot(folder)


def read_packed(
    context: "StageContext", data: Data, tokenizer: Any  # noqa: ANN401 - a transformers tokenizer
) -> dict[str, dict[str, Packed]]:
    """Source -> the rows taken of train and held-out text, packed as training packs them; the rest of a text is not in
    memory."""
    texts: dict[str, dict[str, Packed]] = {}
    taken = context.spec["rows"]
    for source in data.sources:
        for part in ("train", "held_out"):
            name = f"data.{source.name}.{part}"
            lines = each_text(file_chunks(context.store, context.inputs[name], "data.jsonl"), name)
            found = tokenized(lines, tokenizer, context.work / "ids")
            ordered = found.shuffled(f"{data.seed}:{source.name}", end_of(tokenizer))
            rows = first_rows(ordered, data.sequence_tokens, tokenizer.bos_token_id, limit=taken[source.name][part])
            packed = Packed(source.name, *rows, found.size_bytes / max(len(found.ids), 1))
            texts.setdefault(source.name, {})[part] = require_rows(packed, name, 1)
    (context.work / "ids").unlink(missing_ok=True)
    return texts


@contextlib.contextmanager
def _nodes(context: "StageContext", tree: Path) -> Iterator[list[Node]]:
    """The site's nodes, or one of our own."""
    listed = context.where.get("nodes") or []
    if listed:
        yield [node_of(n) for n in listed]
        return
    context.progress(0, 1, "tokens", "starting an engine in pooling mode (a minute or two on a CPU)")
    log = Path(context.where["start"]["logs"]) / f"capture-{context.recipe[:12]}.log"
    overrides = tapped_config(context.store, context.inputs["artifact"], context.spec.get("taps", []))
    with pooling_engine(tree, context.where["start"], context.spec["serve"], log, overrides) as node:
        yield [node]


def _capture(
    context: "StageContext", nodes: list[Node], folder: Path, shards: list[Shard], missing: list[Shard], width: int
) -> None:
    """Fetch what is missing, from nodes that were compared with the base and with each other."""
    longest = max(len(s.tokens) for shard in missing for s in shard.sequences)
    nodes = _answering(nodes)
    own = quantization_of(model_config(context.store, context.inputs["artifact"]))
    for node in nodes:
        node.check(context.inputs["artifact"], longest)
        check_quantization(node, own)
    probe = max(missing[0].sequences, key=lambda s: len(s.tokens))
    _check_states(context, nodes, check_agreement(nodes, probe), width)
    total = sum(shard.tokens for shard in shards)
    done = total - sum(shard.tokens for shard in missing)
    for shard in fill(nodes, folder, missing, context.spec["scheme"], 1 + len(context.spec.get("taps", []))):
        done += shard.tokens
        context.progress(done, total, "tokens", f"{len(nodes)} nodes")


def _answering(nodes: list[Node]) -> list[Node]:
    """The nodes that answer now: one that is down is told and done without. StageFailed where none answers."""
    there, problems = [], []
    for node in nodes:
        try:
            node.models()
            there.append(node)
        except NodeFailed as error:
            problems.append(str(error))
            print(f"capture: {error}; done without this node", file=sys.stderr, flush=True)
    if not there:
        raise StageFailed(f"no inference node answers: {'; '.join(problems)}; start one, or mend nodes: in the site")
    return there


def _check_states(context: "StageContext", nodes: list[Node], found: int, width: int) -> None:
    """BadInput where the states are not of the wanted width, or are of other layers."""
    taps = context.spec.get("taps", [])

    def start(node: Node) -> str:
        config = serving_config if isinstance(node, ServingNode) else tapped_config
        overrides = config(context.store, context.inputs["artifact"], taps)
        return f"start nodes with --hf-overrides '{json.dumps(overrides)}'"

    if found != width * (1 + len(taps)):
        raise BadInput(
            f"{nodes[0].endpoint} gives states of width {found}, the base has {width}"
            + (f" and {len(taps)} taps; {start(nodes[0])}" if taps else "; name nodes of the base")
        )
    for node in nodes:
        told = node.taps()
        if told != taps:
            says = f"gives states after layers {told}" if told else "does not say which layers it gives"
            raise BadInput(f"{node.endpoint} {says}, branch.taps are {taps}; {start(node)}")


def _width(context: "StageContext") -> int:
    return int(model_config(context.store, context.inputs["artifact"])["hidden_size"])


def _salvage(context: "StageContext", folder: Path, shards: list[Shard]) -> None:
    """Take over the whole shards of a damaged capture."""
    earlier = context.where.get("salvage")
    if not earlier:
        return
    for shard in shards:
        if shard.is_whole(folder):
            continue
        for name in (shard.name, f"{shard.name}.json"):
            with contextlib.suppress(Corrupt, BadInput):  # damaged or not there: fetched again
                (folder / name).write_bytes(context.store.read_file(earlier, name))


def _write_rows(folder: Path, texts: dict[str, dict[str, Packed]]) -> None:
    rows = folder / "rows"
    shutil.rmtree(rows, ignore_errors=True)
    rows.mkdir()
    for name, parts in texts.items():
        for part, packed in parts.items():
            tensors = {"tokens": torch.from_numpy(packed.tokens_RT), "positions": torch.from_numpy(packed.positions_RT)}
            save_file({k: t.contiguous() for k, t in tensors.items()}, rows / f"{name}.{part}.safetensors")


def _preflight(shards: list[Shard], scheme: str, width: int, size_bytes: int) -> str:
    tokens = sum(shard.tokens for shard in shards)
    return (
        f"capture: {tokens:,} tokens of width {width} in {scheme}: {size_bytes:,} bytes in {len(shards)} shards "
        f"({size_bytes / max(tokens, 1):,.0f} bytes a token)"
    )
