"""Stage `expand`: a model and the spec's expansion become the expanded model. Reads and writes no tensor."""

from typing import TYPE_CHECKING

from mansard.models.expand import apply, plan
from mansard.models.model_files import model_config
from mansard.records import SnapshotId
from mansard.specs import Expand

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 2
PACKAGES = ()


def run(context: "StageContext") -> SnapshotId:
    expand = Expand.model_validate(dict(context.spec))
    model = context.inputs["model"]
    return apply(context.store, model, plan(model_config(context.store, model), expand))
