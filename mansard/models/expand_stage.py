"""Stage `expand`: a model and the spec's expansion become the expanded model. Reads and writes no tensor.

Inputs: `model`, and for `positions: importance` what that stage made of it, `importance`.
"""

from typing import TYPE_CHECKING

from mansard.models.expand import apply, plan
from mansard.models.model_files import model_config
from mansard.models.placement import IMPORTANCE_FILE, read_gains
from mansard.records import SnapshotId
from mansard.specs.surgery import Expand

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 2
PACKAGES = ()


def run(context: "StageContext") -> SnapshotId:
    expand = Expand.model_validate(dict(context.spec))
    store, model = context.store, context.inputs["model"]
    measured = context.inputs.get("importance")
    gains = None if measured is None else read_gains(store.read_file(measured, IMPORTANCE_FILE))
    return apply(store, model, plan(model_config(store, model), expand, gains))
