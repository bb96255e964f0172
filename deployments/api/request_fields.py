"""The types of fields that several request bodies have, and the base class of these bodies."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from deployments.api.unknown_fields import ignore_field
from parse.types import MAX_STOP_LENGTH

MAX_INTEGER = 9_223_372_036_854_776_000  # the limit in the OpenAI API
MAX_LOGIT_BIAS_TOKENS = 1024
MAX_METADATA_ITEMS = 16  # the limit in the OpenAI API
MAX_JSON_DEPTH = 100


def _reject_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("surrogate", "Input should not contain half of a surrogate pair") from error
    return text


def _read_whole_number(value: Any) -> Any:
    """Accepts 5.0 as 5, because some languages and libraries write whole numbers like this."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _reject_number(value: Any) -> Any:
    """Rejects 0 and 1, which compare equal to False and True."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


Text = Annotated[str, AfterValidator(_reject_lone_surrogates)]
WHOLE_NUMBER = BeforeValidator(_read_whole_number)
PositiveInteger = Annotated[int, Field(ge=1, le=MAX_INTEGER), WHOLE_NUMBER]
NonNegativeInteger = Annotated[int, Field(ge=0, le=MAX_INTEGER), WHOLE_NUMBER]
StopText = Annotated[Text, Field(max_length=MAX_STOP_LENGTH)]
OnlyTrue = Annotated[Literal[True], BeforeValidator(_reject_number)]
OnlyFalse = Annotated[Literal[False], BeforeValidator(_reject_number)]
NoItems = Annotated[list[Any], Field(max_length=0)]
"""An empty list, which clients send instead of leaving a field out."""
CacheControl = dict[str, Any]
"""A hint for the prompt cache of another service."""
PromptText = Annotated[Text, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
TokenIdKey = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$")]  # a token id; keys are strings in JSON
BiasValue = Annotated[float, Field(ge=-100, le=100)]


def _max_items(limit: int) -> BeforeValidator:
    """Rejects a dictionary that is too large before its items are validated."""

    def check_size(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            message = "Input should contain at most {max_items} items"
            raise PydanticCustomError("too_many", message, {"max_items": limit})
        return value

    return BeforeValidator(check_size)


LogitBias = Annotated[
    dict[TokenIdKey, BiasValue],
    Field(max_length=MAX_LOGIT_BIAS_TOKENS, json_schema_extra={"additionalProperties": False}),
    _max_items(MAX_LOGIT_BIAS_TOKENS),
]
Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
    Field(max_length=MAX_METADATA_ITEMS),
    _max_items(MAX_METADATA_ITEMS),
]


def check_json(value: Any) -> Any:
    """Rejects a value that a chat template cannot render: nested deeply, or with half of a surrogate pair."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise PydanticCustomError(
                "depth", "Input should not be nested deeper than {depth}", {"depth": MAX_JSON_DEPTH}
            )
        texts = [item for item in level if isinstance(item, str)]
        texts += [key for item in level if isinstance(item, dict) for key in item]
        _reject_lone_surrogates("".join(texts))
        level = [
            nested
            for item in level
            if isinstance(item, dict | list)
            for nested in (item.values() if isinstance(item, dict) else item)
        ]
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(check_json)]


class OpenAIBaseModel(BaseModel):
    """The base of all request models. It rejects unknown fields by name, unless the operator lets them be ignored.

    Only the first unknown field is reported, because listing all errors of a large body would take seconds.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    REQUIRES: ClassVar[Mapping[str, tuple[str, bool]]] = {}
    """Fields that require another field, and the value that it must have. The OpenAPI document says so as well."""

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_fields(cls, data: Any) -> Any:
        unknown = [name for name in data if name not in cls.model_fields] if isinstance(data, dict) else []
        for name in unknown:
            if not ignore_field(name):
                printable_name = name.encode(errors="replace").decode()
                raise PydanticCustomError("unsupported", "is not supported", {"field": printable_name})
        return {name: value for name, value in data.items() if name in cls.model_fields} if unknown else data

    @classmethod
    def _requirements(cls) -> dict[str, tuple[str, bool]]:
        return {
            field: requirement
            for base in reversed(cls.__mro__)
            if issubclass(base, OpenAIBaseModel)
            for field, requirement in base.REQUIRES.items()
        }

    @model_validator(mode="after")
    def _check_required_fields(self) -> Self:
        for field, (other, required_value) in self._requirements().items():
            value = getattr(self, field)
            if value is not None and value is not False and getattr(self, other) is not required_value:
                raise field_error(field, f"requires {other} to be {json.dumps(required_value)}")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = handler(schema)
        conditions = [
            {
                "if": {"properties": {field: {"not": {"enum": [None, False]}}}, "required": [field]},
                "then": {"properties": {other: {"const": required_value}}, "required": [other]},
            }
            for field, (other, required_value) in cls._requirements().items()
        ]
        if conditions:
            handler.resolve_ref_schema(json_schema)["allOf"] = conditions
        return json_schema


def field_error(field: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message, "field": field})
