"""The training loop: steps, schedule, evaluation on held-out text, checkpoints, a stop where numbers go bad.

It knows an engine, a mixture and a work folder. A loss or gradient that is not finite ends the run before it reaches
the weights; the last good checkpoint stays.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mansard.errors import BadInput, StageFailed
from mansard.specs.training import Train
from mansard.training.data import Batch, Mixture, PackedText
from mansard.training.engines import Engine, Loss
from mansard.training.feed import feed
from mansard.training.optimizer import Schedule
from mansard.training.state import Checkpoints, Cursor

EVALUATION_ROWS = 32
"""Held-out rows a source for the curve (8 k tokens at 256 a row). The verdict rests on the suites, not on these."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the loop does, in steps."""

    schedule: Schedule
    tokens_per_step: int
    evaluate_every_steps: int
    checkpoint_every_steps: int

    @staticmethod
    def of(train: Train, sequence_tokens: int) -> "Plan":
        """Whole steps that fit the token budget; BadInput where it is below one batch."""
        tokens_per_step = train.batch_sequences * sequence_tokens
        steps = train.tokens // tokens_per_step
        if steps == 0:
            raise BadInput(f"train.tokens {train.tokens:,} is below one batch of {tokens_per_step:,} tokens; raise it")
        schedule = Schedule(steps, round(steps * train.warmup_fraction))
        return Plan(schedule, tokens_per_step, train.evaluate_every_steps, train.checkpoint_every_steps)

    @property
    def tokens(self) -> int:
        """What is really taken: whole steps."""
        return self.schedule.steps * self.tokens_per_step


@dataclass(frozen=True, slots=True)
class Moment:
    """What a step tells: `bits_per_byte` by held-out source, empty at steps that evaluate nothing; `drift` in the
    anchor's unit a token of the batch."""

    step: int
    steps: int
    tokens: int
    loss: float
    rate_factor: float
    gradient_norm: float
    bits_per_byte: dict[str, float]
    drift: float = 0.0


def run_loop(
    engine: Engine,
    mixture: Mixture,
    held_out: Sequence[PackedText],
    plan: Plan,
    checkpoints: Checkpoints,
    report: Callable[[Moment], None],
) -> Cursor:
    """Train to the plan's end, from the newest checkpoint where there is one; the cursor at the end holds the curve."""
    cursor = _resumed(engine, checkpoints)
    if not cursor.curve:
        bits = _bits_per_byte(engine, held_out, cursor.step, checkpoints)
        cursor.curve.append({"step": 0, "tokens": 0, "bits_per_byte": bits})
    try:
        _steps(engine, mixture, held_out, plan, checkpoints, report, cursor)
    finally:
        checkpoints.wait()
    return cursor


def _steps(
    engine: Engine,
    mixture: Mixture,
    held_out: Sequence[PackedText],
    plan: Plan,
    checkpoints: Checkpoints,
    report: Callable[[Moment], None],
    cursor: Cursor,
) -> None:
    """From the cursor's step to the plan's end; the cursor moves along."""
    steps = plan.schedule.steps
    for batch in feed(mixture, cursor.step, steps, engine.device.type == "cuda"):
        factor = plan.schedule.factor(cursor.step)
        loss, norm = _one_step(engine, batch, cursor.step, factor, checkpoints)
        cursor.step += 1
        cursor.nats += loss.nats
        cursor.labels += loss.labels
        tokens = cursor.step * plan.tokens_per_step
        bits = {}
        if cursor.step % plan.evaluate_every_steps == 0 or cursor.step == steps:
            bits = _bits_per_byte(engine, held_out, cursor.step, checkpoints)
            mean = cursor.nats / cursor.labels
            cursor.curve.append({"step": cursor.step, "tokens": tokens, "loss": mean, "bits_per_byte": bits})
            cursor.nats, cursor.labels = 0.0, 0
        if cursor.step % plan.checkpoint_every_steps == 0 and cursor.step < steps:
            checkpoints.write(cursor, engine.state())
        report(Moment(cursor.step, steps, tokens, loss.mean, factor, norm, bits, loss.drift / max(loss.labels, 1)))


def _resumed(engine: Engine, checkpoints: Checkpoints) -> Cursor:
    found = checkpoints.read()
    if found is None:
        return Cursor()
    cursor, tensors = found
    engine.load_state(tensors)
    return cursor


def _one_step(
    engine: Engine, batch: Batch, step: int, factor: float, checkpoints: Checkpoints
) -> tuple[Loss, float]:
    try:
        loss = engine.gradients(batch)
        if math.isfinite(loss.nats):
            norm = engine.step(factor)
    except torch.OutOfMemoryError as error:
        raise StageFailed(_no_room(step, checkpoints)) from error
    if not math.isfinite(loss.nats):
        raise StageFailed(_stopped("the loss", loss.mean, step, checkpoints))
    if not math.isfinite(norm):
        raise StageFailed(_stopped("the gradient's norm", norm, step, checkpoints))
    return loss, norm


def _stopped(what: str, value: float, steps_done: int, checkpoints: Checkpoints) -> str:
    return (
        f"training stopped after {steps_done} steps: {what} is {value}, a finite number is needed; "
        f"{kept(checkpoints)}; try lower train.learning_rates or precision: fp32"
    )


def _no_room(steps_done: int, checkpoints: Checkpoints) -> str:
    return (
        f"training stopped after {steps_done} steps: the device has no memory left; {kept(checkpoints)}; "
        "set train.memory_gib below what the device has, or lower train.micro_batch_sequences"
    )


def kept(checkpoints: Checkpoints) -> str:
    """What a run that stopped leaves, in words."""
    found = checkpoints.read()
    return f"the checkpoint of step {found[0].step} is kept in {checkpoints.path}" if found else "no checkpoint yet"


def _bits_per_byte(
    engine: Engine, held_out: Sequence[PackedText], step: int, checkpoints: Checkpoints
) -> dict[str, float]:
    """Of evenly spaced held-out rows; a token counts as the mean bytes of its source's tokens."""
    bits = {}
    for source in held_out:
        count = len(source)
        rows = sorted({i * count // EVALUATION_ROWS for i in range(EVALUATION_ROWS)})
        loss = engine.evaluate([source.batch(rows[i : i + 16]) for i in range(0, len(rows), 16)])
        if not math.isfinite(loss.nats):
            raise StageFailed(_stopped(f"the loss on held-out {source.name}", loss.mean, step, checkpoints))
        bits[source.name] = loss.mean / math.log(2) / source.bytes_per_token
    return bits
