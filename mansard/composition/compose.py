"""Base and branch as one artifact, on the manifest: the base's objects, the branch's file, a config that names both.

vLLM serves it as one model (the plugin's class reads `carry_on` in config.json); the version in the registry that has
this artifact so names base artifact, branch and alpha. It costs the branch's bytes. No tensor is read.
"""

from dataclasses import dataclass
from typing import Any

from mansard.composition.description import FILE, check_base, described
from mansard.composition.shape import BranchShape
from mansard.errors import BadInput
from mansard.models.model_files import model_config, pretty_json
from mansard.records import SnapshotId
from mansard.store.safetensors_header import header_metadata
from mansard.store.snapshot import CONFIG_FILE, Blob, Manifest, TensorFile
from mansard.store.store import Store

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Bases that the plugin serves (infra/vllm-plugin): their logits are the head's product and nothing more."""
PREFIX = "CarryOn"
PLACE = f"carry_on/{FILE}"
"""In a folder: vLLM reads every safetensors file beside config.json as the base's."""


@dataclass(frozen=True, slots=True)
class Composition:
    """What a carry-on artifact consists of."""

    base: SnapshotId
    branch: SnapshotId
    alpha: float


def compose(store: Store, base: SnapshotId, branch: SnapshotId, alpha: float) -> SnapshotId:
    """The artifact. BadInput for a branch of another base, a family that is not served, a negative alpha."""
    config = served_config(store, base)
    if alpha < 0:
        raise BadInput(f"alpha {alpha}: 0 (the base) or more is expected")
    file = store.manifest(branch).files.get(FILE)
    if not isinstance(file, TensorFile):
        raise BadInput(f"snapshot {branch[:12]}: no {FILE} in it; the snapshot of a branch is expected")
    where = f"snapshot {branch[:12]}: {FILE}"
    description = described(header_metadata(file.header), where)
    check_base(description, base, where)
    if description.shape.others:
        bases = 1 + len(description.shape.others)
        raise BadInput(f"{where}: a branch on {bases} bases is not served by vLLM yet; one on a single base is")
    section = {"format": 1, "base": base, "branch": branch, "alpha": alpha, "file": PLACE}
    return _with_section(store, base, config, section, {PLACE: file})


def compose_slots(store: Store, base: SnapshotId, shape: BranchShape, slots: int) -> SnapshotId:
    """The artifact of a base on which up to `slots` branches of one shape are served at once, chosen per request as
    LoRA adapters are; with none loaded it answers as the base."""
    config = served_config(store, base)
    section = {"format": 1, "base": base, "slots": slots, "shape": shape.as_json()}
    return _with_section(store, base, config, section, {})


def served_config(store: Store, base: SnapshotId) -> dict[str, Any]:
    """config.json of a base that can carry; BadInput for a carry-on, and for a family without a class in the plugin."""
    config = model_config(store, base)
    if "carry_on" in config:
        raise BadInput(f"artifact {base[:12]} is a carry-on already; name the version that it stands on as base")
    name = (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise BadInput(f"base {base[:12]}: {name} has no carry-on class; one of {', '.join(ARCHITECTURES)} is expected")
    return config


def _with_section(
    store: Store, base: SnapshotId, config: dict[str, Any], section: dict[str, Any], extra: dict[str, TensorFile]
) -> SnapshotId:
    text = pretty_json({**config, "architectures": [PREFIX + config["architectures"][0]], "carry_on": section})
    files = {**store.manifest(base).files, **extra, CONFIG_FILE: Blob(store.put_bytes(text), len(text))}
    return store.put_manifest(Manifest(files))


def shape_of(store: Store, branch: SnapshotId) -> BranchShape:
    """The shape of a branch's snapshot, from its file's header."""
    file = store.manifest(branch).files.get(FILE)
    assert isinstance(file, TensorFile), f"snapshot {branch[:12]} is no branch"
    return described(header_metadata(file.header), f"snapshot {branch[:12]}: {FILE}").shape


def composition_of(store: Store, artifact: SnapshotId) -> Composition | None:
    """Base, branch and alpha of a carry-on artifact; None for any other."""
    if CONFIG_FILE not in store.manifest(artifact).files:
        return None
    section = model_config(store, artifact).get("carry_on")
    if section is None or "branch" not in section:
        return None
    return Composition(section["base"], section["branch"], section["alpha"])
