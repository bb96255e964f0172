"""A model that calls a tool: the demo pair with a template that supports tools, and a verifier that writes a call."""

import copy
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from parse.pair import Pair
from parse.pipeline import Pipeline
from parse.requests import GenerateRequest
from parse.types import TokenDelta

# The format of Hermes and Qwen, shortened.
TEMPLATE = """
{%- if tools %}<|system|># Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Reply with <tool_call>{"name": ..., "arguments": ...}</tool_call><|end|>{% endif %}
{%- for message in messages %}<|{{ 'user' if message.role == 'tool' else message.role }}|>
{%- if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>
{%- else %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL_TEXT = 'I will look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def with_tool_template(pair: Pair) -> Pair:
    tokenizer = copy.deepcopy(pair.tokenizer)
    tokenizer.chat_template = TEMPLATE
    changed = copy.copy(pair)
    changed.pipeline = replace(pair.pipeline, tokenizer=tokenizer)
    return changed


class ToolCaller:
    """Writes a tool call after a user message, and an answer that repeats the result after a tool message."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._tokenizer = pipeline.tokenizer

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
        prompt = str(self._tokenizer.decode(list(request.prompt_token_ids)))
        _, _, result = prompt.rpartition("<tool_response>")
        has_result = "<tool_response>" in prompt and "<|user|>" not in result
        text = f"The tool says: {result.partition('</tool_response>')[0]}" if has_result else CALL_TEXT
        for token in self._tokenizer.encode(text, add_special_tokens=False):
            yield TokenDelta((token,))
        yield TokenDelta((), finish_reason="stop")
