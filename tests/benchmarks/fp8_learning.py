"""A small model that learns: the same storey on the same data and seed, trained in bf16 and in FP8.

A byte-level Llama is pre-trained on documentation from this Python's library, expanded by four blocks that compute the
identity, and the storey trained on its code. Reported: the mean training loss of the last 40 steps and the loss on text
held out, both ways; how far the FP8 trainer's forward pass is from the fused bf16 model's (KL in nats a token); and the
bytes of the trained tensors as they ship over their own bytes.
"""

import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mansard.demo.corpus import read_domains
from mansard.models.freeze import freeze_except
from mansard.specs.training import LearningRates, Train
from mansard.training.data import Batch, as_batch
from mansard.training.engines import LocalEngine
from mansard.training.optimizer import Group, Schedule
from mansard.training.packing import pack
from mansard.training.preflight import preflight
from mansard.training.quantized_blocks import quantize_linears

CONFIG: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 1024,
    "tie_word_embeddings": False, "attn_implementation": "sdpa",
}  # fmt: skip
BOS = 256
ROWS, ROW_TOKENS = 16, 1024
BASE_STEPS, STEPS = 150, 300
LAST = 40
NEW = {4: 3, 7: 5, 10: 7}


def texts() -> dict[str, list[list[int]]]:
    """Documents of both domains, a token a byte."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "lib2to3"}
    files = [p.relative_to(library) for p in sorted(library.rglob("*.py")) if not skipped & set(p.parts)]
    domains = read_domains(library, [p.as_posix() for p in files])
    return {name: [list(d.text.encode()) for d in found] for name, found in domains.items()}


def rows_of(documents: list[list[int]]) -> list[Batch]:
    tokens, positions = pack(documents, ROW_TOKENS, BOS)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0)).numpy()
    chunks = [order[i : i + ROWS] for i in range(0, len(order) - ROWS + 1, ROWS)]
    return [as_batch(tokens[chunk], positions[chunk]) for chunk in chunks]


def train(engine: LocalEngine, data: list[Batch], steps: int) -> list[float]:
    schedule = Schedule(steps, steps // 20)
    losses = []
    for step in range(steps):
        losses.append(engine.gradients(data[step % len(data)]).mean)
        engine.step(schedule.factor(step))
    return losses


def expansion(base: dict[str, torch.Tensor], device: torch.device) -> tuple[Any, set[str]]:
    """The base with copies of three blocks that compute the identity; names of what trains."""
    sources, depth = [], 0
    for block in range(CONFIG["num_hidden_layers"]):
        sources.append((block, False))
        if block in NEW.values():
            sources.append((block, True))
    state = {name: tensor for name, tensor in base.items() if not name.startswith("model.layers.")}
    names: set[str] = set()
    for depth, (source, is_new) in enumerate(sources):
        prefix = f"model.layers.{source}."
        for name, tensor in base.items():
            if name.startswith(prefix):
                placed = f"model.layers.{depth}." + name.removeprefix(prefix)
                is_silent = is_new and placed.endswith(("o_proj.weight", "down_proj.weight"))
                state[placed] = torch.zeros_like(tensor) if is_silent else tensor
                names |= {placed} if is_new else set()
    model = LlamaForCausalLM(LlamaConfig(**(CONFIG | {"num_hidden_layers": len(sources)})))
    model.load_state_dict(state)
    return model.to(device, torch.bfloat16), names


def one(base: dict[str, torch.Tensor], data: list[Batch], kind: str, device: torch.device) -> tuple[Any, ...]:
    """(engine, losses, names of what trained)."""
    model, names = expansion(base, device)
    freeze_except(model, names)
    if kind == "fp8":
        quantize_linears(model.get_decoder().layers, new_blocks_too=True)
    group = Group("new_blocks", 3e-4, {n: p for n, p in model.named_parameters() if n in names})
    engine = LocalEngine(model, [group], 0.0, 1.0)
    section = Train(tokens=ROWS * ROW_TOKENS, batch_sequences=ROWS, learning_rates=LearningRates(new_blocks=3e-4))
    preflight(engine, data[0], section)
    return engine, train(engine, data, STEPS), names


def compare(device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(device, torch.bfloat16)
    domains = texts()
    base_data, data = rows_of(domains["docstrings"]), rows_of(domains["code"])
    held_out, data = data[:4], data[4:]
    group = Group("base", 6e-4, dict(model.named_parameters()))
    base_losses = train(LocalEngine(model, [group], 0.0, 1.0), base_data, BASE_STEPS)
    base = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    del model
    found: dict[str, Any] = {"steps": STEPS, "base_loss": base_losses[-1]}
    engines = {}
    for kind in ("bf16", "fp8"):
        engine, losses, _ = one(base, data, kind, device)
        engines[kind] = engine
        found[kind] = {
            "first": losses[0],
            "last": sum(losses[-LAST:]) / LAST,
            "held_out": engine.evaluate(held_out).mean,
        }
    found["last_difference"] = found["fp8"]["last"] / found["bf16"]["last"] - 1
    found["held_out_difference"] = found["fp8"]["held_out"] / found["bf16"]["held_out"] - 1
    fused, _ = expansion(base, device)
    shipped = {name: tensor.to(torch.bfloat16) for name, tensor in engines["fp8"].trained().items()}
    fused.load_state_dict(shipped, strict=False)
    probe_BT = torch.cat([batch.tokens_BT[:2] for batch in held_out])
    trainer_BTV = engines["fp8"].logits(probe_BT).log_softmax(-1)
    with torch.inference_mode():
        fused_BTV = fused(input_ids=probe_BT.to(device)).logits.float().cpu().log_softmax(-1)
    found["kl_trainer_to_fused"] = float((trainer_BTV.exp() * (trainer_BTV - fused_BTV)).sum(-1).mean())
    with tempfile.TemporaryDirectory() as folder:
        save_file({n: t.cpu().contiguous() for n, t in shipped.items()}, f"{folder}/trained.safetensors")
        size = Path(folder, "trained.safetensors").stat().st_size
    found["checkpoint_ratio"] = size / sum(t.nbytes for t in shipped.values())
    return found
