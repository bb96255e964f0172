"""The official client of OpenAI for Python."""

import json

import checks
from openai import OpenAI

client = OpenAI(base_url=checks.BASE_URL, api_key="none", max_retries=0)
tools_client = OpenAI(base_url=checks.TOOLS_BASE_URL, api_key="none", max_retries=0)
MESSAGES = [{"role": "user", "content": checks.QUESTION}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@checks.check("chat")
def chat() -> None:
    answer = client.chat.completions.create(model=checks.MODEL, messages=MESSAGES, temperature=0)
    checks.check_text(answer.choices[0].message.content)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@checks.check("streamed chat")
def stream() -> None:
    options = {"include_usage": True}
    with client.chat.completions.stream(
        model=checks.MODEL, messages=MESSAGES, temperature=0, stream_options=options
    ) as events:
        final = events.get_final_completion()
    checks.check_text(final.choices[0].message.content)
    assert final.usage.completion_tokens > 0


@checks.check("completions with log-probabilities")
def completions() -> None:
    answer = client.completions.create(model=checks.MODEL, prompt="Hello.", max_tokens=4, logprobs=2, temperature=0)
    assert len(answer.choices[0].logprobs.tokens) == 4


@checks.check("models")
def models() -> None:
    assert [model.id for model in client.models.list()] == [client.models.retrieve(checks.MODEL).id]


@checks.check("tools")
def tools() -> None:
    messages = list(MESSAGES)
    first = tools_client.chat.completions.create(model=checks.MODEL, messages=messages, tools=[TOOL])
    (call,) = first.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": checks.WEATHER}]
    second = tools_client.chat.completions.create(model=checks.MODEL, messages=messages, tools=[TOOL])
    checks.check_weather(second.choices[0].message.content)


@checks.rejected("structured output", "response_format")
def structured() -> None:
    schema = {"name": "answer", "schema": {"type": "object", "properties": {}}, "strict": True}
    client.chat.completions.create(
        model=checks.MODEL, messages=MESSAGES, response_format={"type": "json_schema", "json_schema": schema}
    )


@checks.rejected("required tools", "tool_choice")
def required_tools() -> None:
    tools_client.chat.completions.create(model=checks.MODEL, messages=MESSAGES, tools=[TOOL], tool_choice="required")


checks.main()
