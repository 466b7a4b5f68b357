"""Stage `prove`: the expansion computes its base's function, bit for bit, and survives being saved and loaded.

In the form `logits`, base and expansion are loaded one after the other, never both, in float32 and in the checkpoint's
type, each by one attention kernel. Logits of random token ids, greedy generation through the key-value cache and its
logits at each step must have the same bytes; then the expansion, saved by transformers and loaded again, must hold the
same tensors and give the same logits. The form `structure` (mansard.models.structure: digests and zeros) loads nothing;
it is taken where the spec says so, or where `auto` finds too little memory for one model in float32. The output is one
file, proof.json, which says the form, what chose it, and the kernels.
"""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mansard.canonical import canonical_json
from mansard.errors import BadInput, StageFailed
from mansard.models.attention_kernels import choose_kernel
from mansard.models.freeze import compare, digest_tensors
from mansard.models.loading import choose_device, load_model
from mansard.models.memory import available_bytes, loading_bytes
from mansard.models.probe import Answers, answers, are_bit_equal, forward_logits, max_abs_difference, random_probe
from mansard.models.structure import held_tensors, prove_structure
from mansard.records import SnapshotId
from mansard.store.store import Store

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 4
PACKAGES = ("torch", "transformers", "safetensors")

PROBE_SEQUENCES = 2
GENERATED_TOKENS = 16


def run(context: "StageContext") -> SnapshotId:
    form, chosen_by = choose_form(context.store, context.inputs["expansion"], context.spec["form"])
    prove = prove_structurally if form == "structure" else prove_by_logits
    proof = {"format": 1, "form": form, "chosen_by": chosen_by, "equal": True, **prove(context)}
    return context.store.put_files({"proof.json": canonical_json(proof)})


def choose_form(store: Store, expansion: SnapshotId, wanted: str) -> tuple[str, str]:
    """(`logits` or `structure`, `spec` or `memory`)."""
    if wanted != "auto":
        return wanted, "spec"
    needed = loading_bytes((h.entry for h in held_tensors(store, expansion).values()), torch.float32.itemsize)
    room = available_bytes()
    if choose_device().type == "cuda":
        room = min(room, torch.cuda.mem_get_info()[0])
    form = "logits" if needed <= room else "structure"
    print(f"prove: {form}: {needed:,} bytes are needed for logits, {room:,} are there", file=sys.stderr, flush=True)
    return form, "memory"


def prove_structurally(context: "StageContext") -> dict[str, Any]:
    """StageFailed unless digests and zeros say that it is equal; the record."""

    def told(done: int, total: int) -> None:
        context.progress(done, total, "bytes", "digests and zeros")

    structure = prove_structure(context.store, context.inputs["base"], context.inputs["expansion"], told)
    return {"tensors": asdict(structure)}


def prove_by_logits(context: "StageContext") -> dict[str, Any]:
    """StageFailed unless the answers have the same bytes; the record."""
    saved = context.work / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    with (
        context.store.using(context.inputs["base"]) as base,
        context.store.using(context.inputs["expansion"]) as expansion,
    ):
        kernels, probe_BT = _prove(context, base, expansion, saved)
    return {
        "types": list(kernels),
        "kernels": kernels,
        "probe": {"sequences": probe_BT.shape[0], "tokens": probe_BT.shape[1], "seed": context.spec["seed"]},
        "generated_tokens": GENERATED_TOKENS,
        "reload_equal": True,
    }


def _prove(context: "StageContext", base: Path, expansion: Path, saved: Path) -> tuple[dict[str, str], torch.Tensor]:
    """StageFailed unless equal; the types in which they are with the attention kernel of each, and the probe."""
    context.progress(0, 5, "loads", "base, in the checkpoint's type")
    own, probe_BT, kernel = _ask(base, context.spec["probe_tokens"], context.spec["seed"])
    dtype = own.logits_BTV.dtype
    kernels = {_name(dtype): kernel}
    context.progress(1, 5, "loads", "expansion, in the checkpoint's type")
    compare_answers(own, _ask_again(expansion, dtype, probe_BT, kernel)[0])
    if dtype != torch.float32:
        context.progress(2, 5, "loads", "base, in float32")
        full, full_kernel = _ask_again(base, torch.float32, probe_BT)
        kernels[_name(torch.float32)] = full_kernel
        context.progress(3, 5, "loads", "expansion, in float32")
        compare_answers(full, _ask_again(expansion, torch.float32, probe_BT, full_kernel)[0])
    context.progress(4, 5, "loads", "expansion, saved and loaded again")
    check_reload(expansion, saved, probe_BT, kernel)
    context.progress(5, 5, "loads", "equal")
    return kernels, probe_BT


def check_finite(model: torch.nn.Module) -> None:
    """BadInput, naming the first, where a tensor of the base holds NaN or infinity."""
    broken = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise BadInput(f"the base's tensor {broken[0]!r}{more} holds NaN or infinity; finite numbers are expected")


def compare_answers(base: Answers, expansion: Answers) -> None:
    """StageFailed, naming what differs, the type and the largest difference, unless all bytes are equal."""
    dtype = _name(base.logits_BTV.dtype)
    if not base.logits_BTV.isfinite().all():
        raise StageFailed(f"the base's logits in {dtype} are not finite, so nothing can be proved against them")
    for what, one, other in (
        ("logits", base.logits_BTV, expansion.logits_BTV),
        ("logits of cached generation", base.step_logits_BGV, expansion.step_logits_BGV),
        ("tokens of cached generation", base.chosen_BG, expansion.chosen_BG),
    ):
        if one.shape != other.shape:
            raise StageFailed(f"{what}: shape {list(other.shape)} of the expansion, {list(one.shape)} of its base")
        if not are_bit_equal(one, other):
            difference = max_abs_difference(one, other)
            raise StageFailed(
                f"the expansion is not its base: {what} in {dtype} differ by up to {difference:.6g}; "
                "a new block must add exactly zero to the residual stream"
            )


def check_reload(path: Path, saved: Path, probe_BT: torch.Tensor, kernel: str) -> None:
    """StageFailed unless the model at `path`, saved by transformers to `saved` and loaded again, is the same model."""
    model = load_model(path, dtype=None, device=choose_device())
    names = list(model.state_dict())
    before, logits_BTV = digest_tensors(model, names), forward_logits(model, probe_BT, kernel)
    model.save_pretrained(saved)
    del model
    again = load_model(saved, dtype=None, device=choose_device())
    changed = compare(before, digest_tensors(again, list(again.state_dict())))
    if changed:
        raise StageFailed(f"saved and loaded again, {len(changed)} tensors of the expansion change, e.g. {changed[0]}")
    if not are_bit_equal(logits_BTV, logits_again_BTV := forward_logits(again, probe_BT, kernel)):
        difference = max_abs_difference(logits_BTV, logits_again_BTV)
        raise StageFailed(f"saved and loaded again, the expansion's logits differ by up to {difference:.6g}")


def _ask(path: Path, tokens: int, seed: int) -> tuple[Answers, torch.Tensor, str]:
    """Answers, in the checkpoint's type, to a fresh probe that fits its vocabulary and its longest context; the probe,
    and the attention kernel."""
    model = load_model(path, None, device=choose_device())
    check_finite(model)
    longest = int(model.config.max_position_embeddings) - GENERATED_TOKENS
    probe_BT = random_probe(int(model.config.vocab_size), PROBE_SEQUENCES, min(tokens, longest), seed)
    kernel = choose_kernel(model, probe_BT.shape[1] + GENERATED_TOKENS)
    return answers(model, probe_BT, GENERATED_TOKENS, kernel), probe_BT, kernel


def _ask_again(path: Path, dtype: torch.dtype, probe_BT: torch.Tensor, kernel: str = "") -> tuple[Answers, str]:
    """Answers in this type by this attention kernel, or by one that is chosen now."""
    model = load_model(path, dtype, device=choose_device())
    kernel = kernel or choose_kernel(model, probe_BT.shape[1] + GENERATED_TOKENS)
    return answers(model, probe_BT, GENERATED_TOKENS, kernel), kernel


def _name(dtype: torch.dtype) -> str:
    return f"{dtype}".removeprefix("torch.")
