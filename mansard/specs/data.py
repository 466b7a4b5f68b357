"""Spec sections: training text and its mixture. Paths are relative to the site's data folder."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from mansard.specs.part import Fraction, Part, Positive


class SourceText(Part):
    """Where a source's text is: `path`, a file (.jsonl, .parquet, .txt) or a folder of files of one kind under the
    site's data folder, or a split of a `hub` data set at a pinned revision. `column` names what holds the text (a
    text file is one document). A bare path stands for {path: ...}, and is written back as one."""

    path: str | None = None
    hub: str | None = None
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    split: str | None = None
    config: str | None = None
    column: str = "text"

    @model_validator(mode="after")
    def exactly_one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("name exactly one of path, hub")
        pins = (self.revision is not None, self.split is not None)
        if pins != (self.hub is not None,) * 2 or (self.config is not None and self.hub is None):
            raise ValueError("hub, revision (a commit of 40 hex digits) and split go together; config is for hub only")
        return self

    @model_serializer
    def as_written(self) -> str | dict[str, str]:
        if self.path is not None and self.column == "text":
            return self.path
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


def _as_text(value: Any) -> Any:  # noqa: ANN401 - whatever a spec holds
    return {"path": value} if isinstance(value, str) else value


Text = Annotated[SourceText, BeforeValidator(_as_text)]


class Source(Part):
    """One training source."""

    name: str
    train: Text
    held_out: Text
    weight: Annotated[float, Field(gt=0)]
    is_domain: bool


class Data(Part):
    """The training mixture. `weight`s are shares of tokens; at least `min_domain_fraction` must be domain data."""

    sources: Annotated[list[Source], Field(min_length=1)]
    sequence_tokens: Positive
    min_domain_fraction: Fraction = 0.3
    seed: int = 0

    @model_validator(mode="after")
    def enough_domain_data(self) -> Self:
        names = [s.name for s in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources {names} has a name twice")
        total = sum(s.weight for s in self.sources)
        domain = sum(s.weight for s in self.sources if s.is_domain) / total
        if domain < self.min_domain_fraction:
            raise ValueError(
                f"the mixture holds {domain:.2f} domain data, min_domain_fraction asks for {self.min_domain_fraction}: "
                "raise the weight of a source with is_domain: true"
            )
        return self
