"""Types of numbers in settings: no booleans, nothing that 64 bits cannot hold; and booleans that are no other word."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from gengap_dist.config.yaml_core import LARGEST


def _not_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    return value


Boolean = Annotated[bool, Field(strict=True)]
"""true or false: pydantic would also take yes, on, t and 1."""
Integer = Annotated[int, BeforeValidator(_not_boolean), Field(ge=-LARGEST, le=LARGEST)]
PositiveInt = Annotated[Integer, Field(gt=0)]
NonNegativeInt = Annotated[Integer, Field(ge=0)]
Number = Annotated[float, BeforeValidator(_not_boolean), Field(allow_inf_nan=False)]
PositiveFloat = Annotated[Number, Field(gt=0)]
NonNegativeFloat = Annotated[Number, Field(ge=0)]
