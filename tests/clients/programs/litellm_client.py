"""LiteLLM, which calls the server as an OpenAI-compatible provider."""

import asyncio
import json
import os

import checks

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # downloads no prices

import litellm
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": checks.QUESTION}]
SERVER = {"model": f"openai/{checks.MODEL}", "api_base": checks.BASE_URL, "api_key": "none", "temperature": 0}
TOOLS_SERVER = {"model": f"openai/{checks.MODEL}", "api_base": checks.TOOLS_BASE_URL, "api_key": "none"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Returns the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
runner = asyncio.Runner()  # the asynchronous connections belong to one event loop


class RecordHolder(BaseModel):
    """Who has the record."""

    name: str
    points: int


@checks.check("chat")
def chat() -> None:
    checks.check_text(litellm.completion(messages=MESSAGES, **SERVER).choices[0].message.content)


@checks.check("streamed chat")
def stream() -> None:
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, **SERVER))
    assert len(chunks) > 2
    checks.check_text("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    assert chunks[-1].choices[0].finish_reason == "stop"


@checks.check("async chat")
def chat_async() -> None:
    answer = runner.run(litellm.acompletion(messages=MESSAGES, **SERVER))
    checks.check_text(answer.choices[0].message.content)


@checks.check("async streamed chat")
def stream_async() -> None:
    async def answer() -> str:
        chunks = await litellm.acompletion(messages=MESSAGES, stream=True, **SERVER)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    checks.check_text(runner.run(answer()))


@checks.check("completions")
def completions() -> None:
    options = SERVER | {"model": f"text-completion-openai/{checks.MODEL}"}
    assert litellm.text_completion(prompt="Hello.", max_tokens=8, **options).choices[0].text


@checks.check("token usage")
def usage() -> None:
    answer = litellm.completion(messages=MESSAGES, **SERVER)
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **SERVER))
    for counts in (answer.usage, chunks[-1].usage):
        assert counts.prompt_tokens == answer.usage.prompt_tokens > 0, counts
        assert counts.completion_tokens > 0, counts
        assert counts.total_tokens == counts.prompt_tokens + counts.completion_tokens, counts


@checks.check("tools")
def tools() -> None:
    messages = list(MESSAGES)
    first = litellm.completion(messages=messages, tools=[TOOL], **TOOLS_SERVER).choices[0]
    (call,) = first.message.tool_calls
    assert first.finish_reason == "tool_calls" and call.function.name == "get_weather", first
    assert json.loads(call.function.arguments) == {"city": "Paris"}, call
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": checks.WEATHER}]
    second = litellm.completion(messages=messages, tools=[TOOL], **TOOLS_SERVER)
    checks.check_weather(second.choices[0].message.content)


@checks.check("streamed tools")
def stream_tools() -> None:
    chunks = list(litellm.completion(messages=MESSAGES, tools=[TOOL], stream=True, **TOOLS_SERVER))
    (call,) = litellm.stream_chunk_builder(chunks, messages=MESSAGES).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}, call


@checks.check("context overflow")
def context_overflow() -> None:
    try:
        litellm.completion(messages=[{"role": "user", "content": "Hello. " * 2000}], **SERVER)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("the model answered")


@checks.rejected("structured output", "response_format")
def structured() -> None:
    litellm.completion(messages=MESSAGES, response_format=RecordHolder, **SERVER)


@checks.rejected("required tools", "tool_choice")
def required_tools() -> None:
    litellm.completion(messages=MESSAGES, tools=[TOOL], tool_choice="required", **TOOLS_SERVER)


checks.main()
