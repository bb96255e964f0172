"""The request bodies of /tokenize and /detokenize."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from deployments.api.messages import Conversation
from deployments.api.request_fields import OpenAIBaseModel, Text, TokenId


class BaseTokenizeRequest(OpenAIBaseModel):
    """POST /tokenize"""

    model: Text | None = None
    return_token_strs: bool | None = None


class TokenizePromptRequest(BaseTokenizeRequest):
    prompt: Text
    messages: None = None
    add_special_tokens: bool | None = Field(
        None, description="Whether the tokenizer adds its special tokens. The default is true, as for completions."
    )


class TokenizeChatRequest(BaseTokenizeRequest, Conversation):
    pass


def _tokenize_kind(data: Any) -> str:
    is_chat = isinstance(data, TokenizeChatRequest) or (isinstance(data, dict) and data.get("messages") is not None)
    return "chat_request" if is_chat else "prompt_request"


TokenizeRequest = Annotated[
    Annotated[TokenizePromptRequest, Tag("prompt_request")] | Annotated[TokenizeChatRequest, Tag("chat_request")],
    Discriminator(_tokenize_kind),
]


class DetokenizeRequest(OpenAIBaseModel):
    """POST /detokenize"""

    model: Text | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
