"""Whole specs: what `adopt`, `upgrade` and `customize` build. mansard/spec_files.py reads them."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mansard.digest import digest_json
from mansard.specs.carry_on import Branch, BranchTrain, Capture, ChooseAlpha
from mansard.specs.data import Data
from mansard.specs.judging import Cost, Fingerprint, Gate
from mansard.specs.part import Part, Positive
from mansard.specs.release import Release
from mansard.specs.surgery import NO_GENERAL_TEXT, Expand, Fuse, Prove, Quantize
from mansard.specs.training import Train


class Base(Part):
    """Where the base comes from: exactly one of a local folder, a hub id with revision, a registered version."""

    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    version: Positive | Literal["stable"] | None = None
    ignore_config_keys: Annotated[list[str], Field(default_factory=list)]
    """Keys of config.json that Mansard does not know and that change nothing the model computes, says the author."""

    @model_validator(mode="after")
    def exactly_one_source(self) -> Self:
        if sum(v is not None for v in (self.path, self.hub, self.version)) != 1:
            raise ValueError("name exactly one of path, hub, version")
        if self.ignore_config_keys and self.version is not None:
            raise ValueError("ignore_config_keys goes with path or hub; a version was checked when its base came in")
        if (self.hub is None) != (self.revision is None):
            raise ValueError("hub and revision go together: pin the revision (a commit) of a hub model")
        return self


class Serve(Part):
    """Engine arguments that change answers."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_model_len: Positive = 1024
    enforce_eager: bool = True
    tensor_parallel: Positive = 1


class Spec(Part):
    """What `adopt`, `upgrade` and `customize` share."""

    format: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    author: str
    base: Base
    serve: Serve = Serve()
    gate: Gate
    fingerprint: Fingerprint
    cost: Cost = Cost()
    release: Release
    data: Data

    def digest(self) -> str:
        return digest_json(self.model_dump(mode="json"))


class QuantizedSpec(Spec):
    """What `adopt` and `upgrade` share: the artifact is made from a model, by quantization or as it is."""

    quantize: Quantize

    @model_validator(mode="after")
    def calibration_source_is_known(self) -> Self:
        names = [s.name for s in self.data.sources]
        if self.quantize.scheme == "awq" and self.quantize.source not in names:
            raise ValueError(f"quantize.source {self.quantize.source!r} is not one of data.sources: {names}")
        return self


class AdoptSpec(QuantizedSpec):
    """A first base: quantized, evaluated without comparison, registered with verdict `baseline`."""


class UpgradeSpec(QuantizedSpec):
    """One upgrade: the adopted steps and a storey."""

    expand: Expand
    prove: Prove = Prove()
    train: Train
    fuse: Fuse = Fuse()

    @model_validator(mode="after")
    def importance_has_general_text(self) -> Self:
        if self.expand.positions == "importance" and all(s.is_domain for s in self.data.sources):
            raise ValueError(NO_GENERAL_TEXT)
        return self


class CustomizeSpec(Spec):
    """A branch on a base in service: captured, trained, composed, judged as an upgrade is."""

    branch: Branch
    capture: Capture
    train: BranchTrain
    alpha: ChooseAlpha = ChooseAlpha()

    @model_validator(mode="after")
    def base_is_a_version(self) -> Self:
        if self.base.version is None:
            raise ValueError("base: name a registered version, or stable: states come from an artifact as served")
        return self
