"""What training says while it runs: every step to the parent process, evaluations also to the log."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from mansard.training.loop import Moment, Plan

if TYPE_CHECKING:
    from mansard.worker import StageContext


def reporter(context: "StageContext", plan: Plan) -> Callable[[Moment], None]:
    """Tells the parent of every step; the log of those that evaluate."""

    def report(moment: Moment) -> None:
        bits = {f"bits_per_byte_{name}": value for name, value in moment.bits_per_byte.items()}
        metrics = {"loss": moment.loss, "rate_factor": moment.rate_factor, "gradient_norm": moment.gradient_norm}
        text = f"loss {moment.loss:.3f}"
        if moment.drift:
            metrics["drift"] = moment.drift
            text += f", drift {moment.drift:.4f}"
        if bits:
            text += "".join(f", {name} {value:.3f} bits/byte" for name, value in moment.bits_per_byte.items())
            print(f"step {moment.step} of {moment.steps}: {text}", file=sys.stderr, flush=True)
        context.progress(moment.tokens, plan.tokens, "tokens", text, **metrics, **bits)

    return report
