"""The base class of all settings: every setting has a description, and unknown keys are rejected."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from parse.renamed_settings import explain_unknown_keys


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    section: ClassVar[str]
    """The name of this section in the documentation."""

    @model_validator(mode="wrap")
    @classmethod
    def _explain_unknown_keys(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise explain_unknown_keys(error, handler, data, cls.section, cls.model_fields) from None


@dataclass(frozen=True, eq=False)
class OneOf:
    """Annotates a string that must be one of the names in a registry.

    Pydantic and JSON schemas show the names as choices. The registry is read at each validation, so names that are
    registered later are valid too.
    """

    registry: Collection[str]
    more: tuple[str, ...] = ()
    """Valid names that are not in the registry."""

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.registry, *self.more)

    def __get_pydantic_core_schema__(self, _source: object, _handler: object) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, _schema: object, _handler: object) -> dict[str, Any]:
        return {"enum": list(self.names), "type": "string"}

    def _validate(self, value: object) -> str:
        if isinstance(value, str) and value in self.names:
            return value
        *others, last = (repr(name) for name in self.names)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
