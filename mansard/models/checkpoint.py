"""A checkpoint against its config.json: every tensor there once, of the shape and the type that the config implies.

Headers only, no tensor is read. Each refusal is one BadInput line that names the first tensor and what is expected.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from mansard.errors import BadInput
from mansard.models.config_keys import check_config_keys
from mansard.models.families import Config, Family, depth_of, family_of
from mansard.models.model_files import model_config, weight_files
from mansard.models.vocabulary import TOKENIZER_FILE, check_vocabulary
from mansard.records import SnapshotId
from mansard.store.safetensors_header import TensorEntry, parse_safetensors_header
from mansard.store.snapshot import CONFIG_FILE, read_json_object
from mansard.store.store import Store

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Types of a model's tensors: the name in config.json -> the name in safetensors."""


def check_folder(tree: Path, ignored_keys: Collection[str] = ()) -> None:
    """BadInput unless the model in a folder is one that can be expanded: family, keys, tensors, vocabulary."""
    config = read_json_object((tree / CONFIG_FILE).read_bytes(), str(tree / CONFIG_FILE))
    files = {path.name: parse_safetensors_header(path)[1] for path in sorted(tree.glob("*.safetensors"))}
    tokenizer = tree / TOKENIZER_FILE
    _check(config, ignored_keys, files, tokenizer.read_bytes() if tokenizer.is_file() else None)


def check_snapshot(store: Store, model: SnapshotId, ignored_keys: Collection[str] = ()) -> None:
    """The same of a model in the store; reads the manifest and small files."""
    manifest = store.manifest(model)
    files = {path: file.entries(path) for path, file in weight_files(manifest).items()}
    tokenizer = store.read_file(model, TOKENIZER_FILE) if TOKENIZER_FILE in manifest.files else None
    _check(model_config(store, model), ignored_keys, files, tokenizer)


def _check(
    config: Config, ignored_keys: Collection[str], files: Mapping[str, Collection[TensorEntry]], tokenizer: bytes | None
) -> None:
    check_config_keys(config, ignored_keys)
    family = family_of(config)
    check_once(files)
    check_tensors(family, config, {e.name: e for found in files.values() for e in found})
    if tokenizer is not None:
        check_vocabulary(config, tokenizer)


def check_once(files: Mapping[str, Collection[TensorEntry]]) -> None:
    """BadInput where two files hold a tensor of the same name."""
    seen: dict[str, str] = {}
    for path, found in files.items():
        for entry in found:
            if entry.name in seen:
                raise BadInput(
                    f"tensor {entry.name!r} is in both {seen[entry.name]} and {path}; each tensor stands in one file"
                )
            seen[entry.name] = path


def check_tensors(family: Family, config: Config, entries: Mapping[str, TensorEntry]) -> None:
    """BadInput for a tensor missing, left over, of another shape, or of another type than config.json says."""
    outer = dict(family.outer_shapes(config))
    wanted = {name: outer[name] for name in family.outer_tensors(config)}
    optional = set(outer) - set(wanted)
    for block in range(depth_of(config)):
        shapes = family.block_shapes(config, block)
        wanted.update({family.block_tensor(block, name): shape for name, shape in shapes.items()})
        optional |= {family.block_tensor(block, name) for name in family.optional_block_tensors}
    if missing := wanted.keys() - entries.keys():
        raise BadInput(_some(missing, "missing from the checkpoint, though config.json asks for it"))
    if extra := entries.keys() - wanted.keys() - optional:
        raise BadInput(_some(extra, f"not a tensor of a {family.model_type} model of this config.json"))
    shapes = {**outer, **wanted}
    wrong = {n: e for n, e in entries.items() if n in shapes and e.shape != shapes[n]}
    if wrong:
        name = min(wrong)
        found = f"has the shape {list(wrong[name].shape)}, but config.json implies {list(shapes[name])}"
        raise BadInput(_some(wrong, found, verb=""))
    _check_types(config, {n: e.dtype for n, e in entries.items() if n in shapes})


def _check_types(config: Config, types: Mapping[str, str]) -> None:
    """One type for all: transformers would turn the others into it without a word."""
    said = config.get("dtype", config.get("torch_dtype"))
    if said is not None and said not in DTYPES:
        raise BadInput(f"config.json: dtype: {said!r:.80}; one of {', '.join(DTYPES)} is expected")
    expected = types[min(types)] if said is None else DTYPES[str(said)]
    if expected not in DTYPES.values():
        raise BadInput(f"tensor {min(types)!r} is {expected}; one of {', '.join(DTYPES.values())} is expected")
    if wrong := {n for n, dtype in types.items() if dtype != expected}:
        whose = f"config.json's dtype is {said}" if said is not None else f"tensor {min(types)!r} is {expected}"
        raise BadInput(_some(wrong, f"{types[min(wrong)]}, but {whose}: save the model in one type"))


def _some(names: Collection[str], what: str, verb: str = "is ") -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {min(names)!r}{more} {verb}{what}"
