"""Stage `remove-storey`: a model and the number of a storey (1 is the oldest) become the model without it.

Reads and writes no tensor. The result is a candidate like any other: it is quantized, judged and registered.
"""

from typing import TYPE_CHECKING

from mansard.models.remove_storey import remove_storey
from mansard.records import SnapshotId

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 1
PACKAGES = ()


def run(context: "StageContext") -> SnapshotId:
    return remove_storey(context.store, context.inputs["model"], context.spec["storey"])
