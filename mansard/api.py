"""A model gains a storey in a few lines of Python: expand, train, fuse, save, on a Hugging Face folder.

No server, no site file, no flow: the stages run in this process, on a store in `workspace`, and what was made there is
remembered, so a script that was stopped goes on where it was. They are the stages that `mansard upgrade` runs.
Not covered: quantization, evaluation and release (the command does those), several processes.
"""

import importlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress, TaskID

from mansard.errors import BadInput
from mansard.launch import Request, recipe_with
from mansard.models.config_keys import check_config_keys
from mansard.models.tokenizer_files import take_tokenizer
from mansard.records import SnapshotId
from mansard.specs.data import Data, SourceText
from mansard.specs.surgery import Expand, Fuse, Placement, Probe
from mansard.specs.training import LearningRates, Train
from mansard.stages import declaration
from mansard.store.snapshot import CONFIG_FILE, check_model_tree, read_json_object
from mansard.store.store import Store
from mansard.training.sources import TEXT_FILE, line_of, take_text
from mansard.training.text_files import documents, files_of
from mansard.worker import derive_here

HELD_OUT_EVERY = 20
"""Without held-out text of its own, a source gives every twentieth document of a seeded order for the curve."""


@dataclass(frozen=True, slots=True)
class Text:
    """Training text: a file (.jsonl, .parquet, .txt) or a folder of files of one kind; `column` holds the text.

    `weight` is its share of the tokens among all sources. `is_domain` marks what the new blocks should learn; the rest
    keeps what the model knows. Without `held_out` the text is split in memory.
    """

    name: str
    path: str | Path
    weight: float = 1.0
    is_domain: bool = False
    held_out: str | Path | None = None
    column: str = "text"


@dataclass(frozen=True, slots=True)
class Model:
    """A model in a workspace's store. `base` is what an expansion was made of; `trained` what its training made."""

    store: Store
    snapshot: SnapshotId
    base: SnapshotId
    trained: SnapshotId | None = None


def expand(
    model: str | Path,
    blocks: int,
    positions: Placement | list[int] = "even",
    workspace: str | Path = ".mansard-workspace",
    texts: Sequence[Text] = (),
    ignore_config_keys: Sequence[str] = (),
    **settings: Any,  # noqa: ANN401 - further keys of specs.Expand
) -> Model:
    """`blocks` Pro blocks inserted into the Hugging Face folder `model`; proved to compute the same logits, bit by bit.
    For positions "importance" `texts` holds general text (is_domain false), on which the blocks are weighed: by default
    32 rows of 512 tokens; probe={"rows": 8, "tokens": 256} takes less. `ignore_config_keys` are keys of config.json
    that Mansard does not know and that change nothing the model computes.

    Raises BadInput for a folder or positions that cannot be expanded, StageFailed where the proof fails.
    """
    tree = Path(model)
    check_model_tree(tree)
    check_config_keys(read_json_object((tree / CONFIG_FILE).read_bytes(), str(tree / CONFIG_FILE)), ignore_config_keys)
    store = Store(Path(workspace) / "store")
    base = store.snapshot(tree)
    spec = _checked(Expand, {"blocks": blocks, "positions": positions, **settings})
    inputs = {"model": base}
    if spec.positions == "importance":
        inputs["importance"] = _importance(store, base, texts, spec.probe)
    expansion = _derive(store, "expand", inputs, spec.model_dump(mode="json", exclude={"probe"}))
    _derive(store, "prove", {"base": base, "expansion": expansion}, {"probe_tokens": 64, "seed": 0, "form": "auto"})
    return Model(store, expansion, base)


def train(
    model: Model,
    texts: Sequence[Text],
    tokens: int,
    learning_rate: float = 2e-4,
    sequence_tokens: int = 1024,
    batch_sequences: int = 8,
    **settings: Any,  # noqa: ANN401 - further keys of specs.Train
) -> Model:
    """The new blocks learn `tokens` tokens of the mixture; the base stays frozen, and that is measured.

    `settings` are further keys of `mansard.specs.Train` (precision="fp32", seed=1, ...). Raises BadInput for settings
    and texts that cannot be used, StageFailed where the loss is not finite; call it again to go on from the checkpoint.
    """
    sources = [
        {"name": t.name, "train": f"{t.name}.train", "held_out": f"{t.name}.held_out", "weight": t.weight,
         "is_domain": t.is_domain}
        for t in texts
    ]
    data = _checked(Data, {"sources": sources, "sequence_tokens": sequence_tokens})
    rates = LearningRates(new_blocks=learning_rate)
    wanted = {"tokens": tokens, "batch_sequences": batch_sequences, "learning_rates": rates, **settings}
    spec = {"data": data.model_dump(mode="json"), "train": _checked(Train, wanted).model_dump(mode="json")}
    inputs = {"expansion": model.snapshot, **_tokenized(model, texts, data)}
    trained = _derive(model.store, "train", inputs, spec)
    return Model(model.store, model.snapshot, model.base, trained)


def fuse(model: Model, method: Literal["residual", "average"] = "residual", weight: float | None = None) -> Model:
    """The plain Hugging Face checkpoint of the expanded depth, compared with what was trained; BadInput without one.

    Method "average" then averages each new block into the one that it copied, at the old depth (`weight` is the new
    block's share, 0.5 by default). That changes the base, keeps a part of the gain and may cost what the base knew:
    the README has figures.
    """
    spec = _checked(Fuse, {"method": method, "weight": weight})
    if model.trained is None:
        raise BadInput("this model was not trained yet: fuse(train(expand(...), ...))")
    inputs = {"expansion": model.snapshot, "trained": model.trained}
    fused = _derive(model.store, "fuse", inputs, {"method": "residual"})
    if spec.method == "average":
        fused = _derive(model.store, "average", {"model": fused}, {"weight": spec.share})
    return Model(model.store, fused, model.base, model.trained)


def save(model: Model, folder: str | Path) -> Path:
    """Write the model as a Hugging Face folder; BadInput where `folder` is there and not empty."""
    model.store.restore(model.snapshot, Path(folder))
    return Path(folder)


def _importance(store: Store, base: SnapshotId, texts: Sequence[Text], probe: Probe) -> SnapshotId:
    """What each block is worth to the general ones of `texts`."""
    general = [text for text in texts if not text.is_domain]
    if not general:
        raise BadInput("positions: importance needs general text: name texts with one of is_domain=False, or take even")
    inputs = {f"data.{t.name}.train": _taken(store, t)[0] for t in general}
    return _derive(store, "importance", {"model": base, **inputs}, probe.model_dump(mode="json"))


def _tokenized(model: Model, texts: Sequence[Text], data: Data) -> dict[str, SnapshotId]:
    """The shards of every text, by the input's name in stage `train`."""
    tokenizer = take_tokenizer(model.store, model.base)
    spec = {"sequence_tokens": data.sequence_tokens, "seed": data.seed}
    made = {}
    for text in texts:
        for part, snapshot in zip(("train", "held_out"), _taken(model.store, text), strict=True):
            name = f"data.{text.name}.{part}"
            made[name] = _derive(model.store, "tokenize", {"tokenizer": tokenizer, name: snapshot}, spec)
    return made


def _derive(store: Store, stage: str, inputs: Mapping[str, SnapshotId], spec: Mapping[str, Any]) -> SnapshotId:
    """Recalled, or made by the stage in this process with the versions installed here."""
    declared = declaration(stage)
    request = Request(stage, inputs, spec)
    recipe = recipe_with(request, {p: version(p) for p in declared.packages})
    known = store.recall(recipe)
    if known is not None:
        return known
    module = importlib.import_module(declared.module)
    message = {"recipe": recipe, "inputs": dict(inputs), "spec": dict(spec), "where": {}}
    with _Bar(stage) as bar:
        made = derive_here(store, stage, module.run, message, "in this process", bar)
    return str(made["snapshot"])


class _Bar:
    """A stage's progress as a bar on standard error."""

    def __init__(self, stage: str) -> None:
        self._bars = Progress(console=Console(stderr=True), transient=True)
        self._row: TaskID = self._bars.add_task(stage, total=None)

    def __enter__(self) -> "_Bar":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def send(self, message: dict[str, Any]) -> None:
        told = message["progress"]
        self._bars.update(self._row, completed=told["done"], total=told["total"])


def _taken(store: Store, text: Text) -> tuple[SnapshotId, SnapshotId]:
    """(training, held-out) text of one source in the store."""
    if text.held_out is not None:
        paths = (text.path, text.held_out)
        taken = [take_text(store, SourceText(path=str(p), column=text.column), Path(), text.name) for p in paths]
        return taken[0], taken[1]
    files = files_of(Path(text.path), text.name)
    lines = [line_of(document, text.name) for document in documents(files, text.column, text.name)]
    if len(lines) < 2:
        raise BadInput(f"{text.path}: {len(lines)} document; two are needed to hold one out, or name held_out")
    random.Random(0).shuffle(lines)  # noqa: S311 - an order, not a secret
    count = max(1, len(lines) // HELD_OUT_EVERY)
    learned, held_out = (store.put_files({TEXT_FILE: b"".join(found)}) for found in (lines[count:], lines[:count]))
    return learned, held_out


def _checked(kind: Any, settings: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a part of a spec
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"]) or kind.__name__.lower()
        raise BadInput(f"{place}: {first['msg']}; known: {', '.join(kind.model_fields)}") from error
