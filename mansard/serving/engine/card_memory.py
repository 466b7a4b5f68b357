"""What of a GPU's memory this site's engines may take: `engine.gpu_memory_gib` as vLLM's arguments. Standard library.

vLLM takes a fraction of the card (`--gpu-memory-utilization`) and counts its own weights, activations and KV cache
against it, whatever other processes hold; it refuses to start where less than that is free. Outside the fraction lie
its CUDA context and captured graphs (29.3 GiB where the fraction said 28.0: one H200, vLLM 0.26, 2026-11-30), so the
fraction is of `gpu_memory_gib` less OUTSIDE_GIB. The card's numbers are nvidia-smi's. Does not cover MIG, and engines
on different cards: all take the first one that they see (with tensor parallelism the first ones).
"""

import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mansard.errors import BadInput, StageFailed
from mansard.site_checks import LEAST_GPU_GIB

if TYPE_CHECKING:
    from mansard.site import Site

OUTSIDE_GIB = 1.5
ANSWER_SECONDS = 20.0
GLANCE_SECONDS = 2.0
"""Of `status`, which must not wait for a driver."""
QUERY = "index,uuid,memory.total,memory.reserved,memory.free"


@dataclass(frozen=True, slots=True)
class Card:
    """`total_gib` is what programs can have: without what the driver reserves."""

    index: str
    uuid: str
    total_gib: float
    free_gib: float


def engine_memory(site: "Site", tensor_parallel: int) -> list[str]:
    """vLLM's arguments for one engine, which is about to start; none where the site states no memory. StageFailed where
    a card that it would take has less free."""
    asked_gib = site.engine.gpu_memory_gib
    if asked_gib is None:
        return []
    cards = visible_cards(site)
    if len(cards) < tensor_parallel:
        raise BadInput(f"serve.tensor_parallel: {tensor_parallel} cards, this machine shows {len(cards)}; lower it")
    for card in cards[:tensor_parallel]:
        if card.free_gib < asked_gib:
            raise StageFailed(
                f"engine.gpu_memory_gib: an engine may take {asked_gib} GiB, card {card.index} has "
                f"{card.free_gib:.1f} GiB free of {card.total_gib:.1f}; end what else runs on it, or lower the key in "
                f"{site.path}"
            )
    share = (asked_gib - OUTSIDE_GIB) / min(card.total_gib for card in cards[:tensor_parallel])
    return [f"--gpu-memory-utilization={int(share * 10_000) / 10_000:.4f}"]


def engines_at_most(site: "Site") -> int:
    """Of each model stable and the rollback window, and one candidate: evaluated, then the canary."""
    return len(site.models) * (1 + site.rollback_window) + 1


def check_card(site: "Site") -> None:
    """BadInput where the engines that this site keeps do not fit its card together; nothing where it states none."""
    if site.engine.gpu_memory_gib is not None and (problem := _crowding(site, visible_cards(site)[0])):
        raise BadInput(problem)


def card_warning(site: "Site") -> str:
    """What `check_card` would refuse, for whoever only looks; empty too where nvidia-smi says nothing soon."""
    if site.engine.gpu_memory_gib is None:
        return ""
    try:
        return _crowding(site, visible_cards(site, GLANCE_SECONDS)[0])
    except BadInput:  # an engine that starts says it
        return ""


def _crowding(site: "Site", card: Card) -> str:
    """That the site's engines do not fit the card together, with what would; empty where they do."""
    asked_gib, engines = site.engine.gpu_memory_gib or 0, engines_at_most(site)
    if engines * asked_gib <= card.total_gib:
        return ""
    models = f" of {len(site.models)} models" if len(site.models) > 1 else ""
    fitting_gib = int(card.total_gib // engines)
    change = f"lower it to {fitting_gib}, or rollback_window"
    if fitting_gib < LEAST_GPU_GIB:
        change = f"lower rollback_window, or take a larger card: an engine has {LEAST_GPU_GIB} GiB at least"
    return (
        f"{site.path}: engine.gpu_memory_gib: {engines} engines (stable and rollback_window {site.rollback_window}"
        f"{models}, one candidate) of {asked_gib} GiB are {engines * asked_gib} GiB, card {card.index} has "
        f"{card.total_gib:.1f}; {change}"
    )


def visible_cards(site: "Site", answer_seconds: float = ANSWER_SECONDS) -> list[Card]:
    """The cards that an engine sees, in its order; BadInput where there is none."""
    variables = {**os.environ, **site.environments[site.engine.environment].variables}
    cards = _ask(variables, answer_seconds)
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        chosen = [[c for c in cards if name == c.index or c.uuid.startswith(name)] for name in names]
        cards = [matching[0] for matching in chosen if matching]
    if not cards:
        raise BadInput(f"engine.gpu_memory_gib: nvidia-smi shows no card (CUDA_VISIBLE_DEVICES={visible!r}); "
                       "leave the key out on a machine without a GPU")  # fmt: skip
    return cards


def _ask(variables: dict[str, str], answer_seconds: float) -> list[Card]:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=answer_seconds,
            env=variables,
        )  # fmt: skip
        return [_card(line) for line in answer.stdout.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise BadInput(f"engine.gpu_memory_gib: nvidia-smi does not say what the card has ({reason}); install NVIDIA's "
                       "driver, or leave the key out on a machine without a GPU") from error  # fmt: skip


def _card(line: str) -> Card:
    index, uuid, *numbers = (part.strip() for part in line.split(","))
    total, reserved, free = (float(n) if n.replace(".", "").isdigit() else 0.0 for n in numbers)  # [N/A]: older drivers
    if total == 0.0:
        raise ValueError(f"no total in {line.strip()!r}")
    return Card(index, uuid, (total - reserved) / 1024, free / 1024)
