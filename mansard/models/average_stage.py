"""Stage `average`: a fused model's newest storey is averaged into the blocks that it copied. Input `model`, what stage
`fuse` made (so it is what was trained); spec: {"weight": 0 < w <= 1}, the new blocks' share."""

from typing import TYPE_CHECKING

from mansard.models.average import average
from mansard.records import SnapshotId

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 1
PACKAGES = ("torch",)


def run(context: "StageContext") -> SnapshotId:
    def told(done: int, total: int) -> None:
        context.progress(done, total, "tensors", "averaging")

    return average(context.store, context.inputs["model"], context.spec["weight"], told)
