"""Stage `compose`: a base artifact and a branch become the artifact that is evaluated, approved and served.

Inputs: `artifact`, `branch`. Spec: {"alpha": number}. Reads no tensor.
"""

from typing import TYPE_CHECKING

from mansard.composition.compose import compose
from mansard.records import SnapshotId

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 1
PACKAGES = ()


def run(context: "StageContext") -> SnapshotId:
    return compose(context.store, context.inputs["artifact"], context.inputs["branch"], float(context.spec["alpha"]))
