"""What a branch says of itself, in the metadata of its file. No torch."""

import json
from dataclasses import dataclass
from typing import Any

from mansard.canonical import canonical_json
from mansard.composition.shape import BranchShape
from mansard.errors import BadInput
from mansard.records import SnapshotId

FORMAT = 1
FILE = "branch.safetensors"
METADATA = "carry_on"


@dataclass(frozen=True, slots=True)
class BranchDescription:
    """`base` is the artifact whose states it was trained on; `trained_alpha` is the alpha of its training. `others` are
    the artifacts of the other bases of a mixture, in the order of `shape.others`."""

    base: SnapshotId
    shape: BranchShape
    trained_alpha: float
    others: tuple[SnapshotId, ...] = ()

    def metadata(self) -> dict[str, str]:
        """For the file's header."""
        told = {
            "format": FORMAT,
            "base": self.base,
            "shape": self.shape.as_json(),
            "trained_alpha": self.trained_alpha,
            **({"others": list(self.others)} if self.others else {}),
        }
        return {METADATA: canonical_json(told).decode()}


def described(metadata: dict[str, str], where: str) -> BranchDescription:
    """Read what `metadata` wrote; BadInput where it is no branch's, or of another format."""
    if METADATA not in metadata:
        raise BadInput(f"{where}: no {METADATA!r} in its metadata; a branch that mansard customize made is expected")
    value: dict[str, Any] = json.loads(metadata[METADATA])
    if value.get("format") != FORMAT:
        raise BadInput(f"{where}: branch format {value.get('format')!r}; this Mansard reads format {FORMAT}")
    others = tuple(value.get("others", ()))
    return BranchDescription(value["base"], BranchShape.from_json(value["shape"]), value["trained_alpha"], others)


def check_base(description: BranchDescription, base: SnapshotId, where: str) -> None:
    """BadInput for another base than the branch was trained for."""
    if description.base != base:
        raise BadInput(
            f"{where}: this branch was trained on base {description.base[:12]}, not on {base[:12]}; "
            "customize derives it again on another base"
        )
