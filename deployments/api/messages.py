"""The conversations in request bodies."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from deployments.api.request_fields import CacheControl, NoItems, OpenAIBaseModel, Text, field_error
from parse.prompts import PromptEnding


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
    tool_calls: NoItems | None = None

    def to_template_message(self) -> dict[str, str]:
        raise NotImplementedError

    def _template_message(self, role: str, content: Content) -> dict[str, str]:
        return {
            "role": role,
            "content": join_text_parts(content),
            **({"name": self.name} if self.name else {}),
            **({"reasoning_content": self.reasoning_content} if self.reasoning_content else {}),
        }


class InputMessage(BaseMessage):
    role: Literal["system", "developer", "user"]
    content: Content

    def to_template_message(self) -> dict[str, str]:
        return self._template_message("system" if self.role == "developer" else self.role, self.content)


class AssistantMessage(BaseMessage):
    role: Literal["assistant"]
    content: Content | None = None

    def to_template_message(self) -> dict[str, str]:
        return self._template_message(self.role, "" if self.content is None else self.content)


def _message_kind(data: Any) -> str:
    role = data.get("role") if isinstance(data, dict) else getattr(data, "role", None)
    return "assistant" if role == "assistant" else "input"


ChatMessage = Annotated[
    Annotated[InputMessage, Tag("input")] | Annotated[AssistantMessage, Tag("assistant")], Discriminator(_message_kind)
]


class Conversation(OpenAIBaseModel):
    """The fields from which a prompt is rendered."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    chat_template_kwargs: dict[str, Any] | None = Field(
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
    def _check_ending(self) -> "Conversation":
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise field_error("continue_final_message", "requires add_generation_prompt to be false")
        return self

    @property
    def prompt_ending(self) -> PromptEnding:
        if self.continue_final_message:
            return "unfinished_message"
        return "nothing" if self.add_generation_prompt is False else "assistant_header"

    def to_template_messages(self) -> list[dict[str, str]]:
        return [message.to_template_message() for message in self.messages]


def join_text_parts(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
