"""What every section of a spec is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]


class Part(BaseModel):
    """A section of a spec."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
