"""The conversations in request bodies."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from deployments.api.request_fields import (
    WHOLE_NUMBER,
    CacheControl,
    JsonObject,
    NoItems,
    OnlyFalse,
    OpenAIBaseModel,
    Text,
    check_json,
    field_error,
)
from parse.prompts import Message, PromptEnding
from parse.tool_calls import MAX_NAME_LENGTH

MAX_TOOLS = 128  # the limit in the OpenAI API
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
ToolName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class TextContentPart(OpenAIBaseModel):
    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = None


Content = Text | Annotated[list[TextContentPart], Field(min_length=1, fail_fast=True)]


class BaseMessage(OpenAIBaseModel):
    name: Text | None = Field(None, max_length=256, description="The chat template decides whether the model sees it.")
    cache_control: CacheControl | None = None
    # Clients send messages of earlier responses back, which have these fields.
    reasoning_content: Text | None = None
    refusal: None = None
    annotations: NoItems | None = None
    audio: None = None
    function_call: None = None

    def to_template_message(self) -> Message:
        raise NotImplementedError

    def _template_message(self, role: str, content: Content) -> dict[str, Any]:
        return {
            "role": role,
            "content": join_text_parts(content),
            **({"name": self.name} if self.name else {}),
            **({"reasoning_content": self.reasoning_content} if self.reasoning_content else {}),
        }


class InputMessage(BaseMessage):
    role: Literal["system", "developer", "user"]
    content: Content
    tool_calls: NoItems | None = None

    def to_template_message(self) -> Message:
        return self._template_message("system" if self.role == "developer" else self.role, self.content)


class CalledFunction(OpenAIBaseModel):
    """A function that the model has called. What the model wrote may be wrong, and is sent back as it is."""

    name: Annotated[Text, Field(min_length=1, max_length=MAX_NAME_LENGTH)]
    arguments: Text | None = Field(None, description="JSON. Nothing means no arguments.")

    def to_template_function(self) -> dict[str, Any]:
        try:
            arguments = check_json(json.loads(self.arguments or "{}"))
        except (ValueError, RecursionError):
            arguments = self.arguments
        return {"name": self.name, "arguments": arguments}  # templates expect an object and not its JSON


class MessageToolCall(OpenAIBaseModel):
    """A call in an earlier message of the assistant."""

    id: Annotated[Text, Field(min_length=1, max_length=256)]
    type: Literal["function"] | None = "function"
    function: CalledFunction
    index: Annotated[int, WHOLE_NUMBER] | None = None  # some clients send the deltas of a stream back


class AssistantMessage(BaseMessage):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None

    def to_template_message(self) -> Message:
        message = self._template_message(self.role, "" if self.content is None else self.content)
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function.to_template_function()}
                for call in self.tool_calls
            ]
        return message


class ToolMessage(BaseMessage):
    """The result of a call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Text

    def to_template_message(self) -> Message:
        return self._template_message(self.role, self.content) | {"tool_call_id": self.tool_call_id}


def _message_kind(data: Any) -> str:
    role = data.get("role") if isinstance(data, dict) else getattr(data, "role", None)
    return f"{role}_message" if role in ("assistant", "tool") else "input_message"


ChatMessage = Annotated[
    Annotated[InputMessage, Tag("input_message")]
    | Annotated[AssistantMessage, Tag("assistant_message")]
    | Annotated[ToolMessage, Tag("tool_message")],
    Discriminator(_message_kind),
]


class FunctionDefinition(OpenAIBaseModel):
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = Field(None, description="A JSON schema.")
    strict: OnlyFalse | None = None


class Tool(OpenAIBaseModel):
    type: Literal["function"]
    function: FunctionDefinition
    cache_control: CacheControl | None = None

    def to_template_tool(self) -> dict[str, Any]:
        function = self.function.model_dump(exclude={"strict"}, exclude_none=True)
        return {"type": self.type, "function": {"parameters": NO_PARAMETERS, **function}}


class Conversation(OpenAIBaseModel):
    """The fields from which a prompt is rendered."""

    REQUIRES: ClassVar = {"continue_final_message": ("add_generation_prompt", False)}

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="Functions that the model can call. Its chat template has to support them."
    )
    tool_choice: Literal["none", "auto"] | None = Field(
        None, description="With none, the model does not see the tools. The default is auto."
    )
    chat_template_kwargs: JsonObject | None = Field(
        None, description="Variables for the chat template, for example `enable_thinking`. They replace the operator's."
    )
    add_generation_prompt: bool | None = Field(
        None, description="If false, the prompt ends with the last message, without the header of an answer."
    )
    continue_final_message: bool | None = Field(
        None,
        description="If true, the answer continues the last message. It needs `add_generation_prompt: false`.",
    )

    @model_validator(mode="after")
    def _check_tools(self) -> "Conversation":
        names = [tool.function.name for tool in self.tools or ()]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise field_error(f"tools[{index}].function.name", "is the name of an earlier tool too")
        open_calls: set[str] = set()
        for index, message in enumerate(self.messages):
            if isinstance(message, AssistantMessage):
                open_calls = {call.id for call in message.tool_calls or ()}
            elif not isinstance(message, ToolMessage):
                open_calls = set()
            elif message.tool_call_id not in open_calls:
                field = f"messages[{index}].tool_call_id"
                raise field_error(field, "is not the id of a call in the last message of the assistant")
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model sees."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def can_be_drafted_in_other_tokens(self) -> bool:
        """Whether it has no tools, and the answer is a message of its own."""
        uses_tools = bool(self.offered_tools) or any(
            isinstance(message, ToolMessage) or (isinstance(message, AssistantMessage) and message.tool_calls)
            for message in self.messages
        )
        return self.prompt_ending == "assistant_header" and not uses_tools

    @property
    def prompt_ending(self) -> PromptEnding:
        if self.continue_final_message:
            return "unfinished_message"
        return "last_message" if self.add_generation_prompt is False else "assistant_header"

    def to_template_messages(self) -> list[Message]:
        return [message.to_template_message() for message in self.messages]


def join_text_parts(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
