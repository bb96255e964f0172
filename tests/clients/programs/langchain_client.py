"""LangChain, with its chat model for OpenAI and its agents."""

import asyncio
import os

import checks

os.environ["LANGSMITH_TRACING"] = "false"

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

QUESTION = {"messages": [{"role": "user", "content": "What is the weather in Paris?"}]}
model = ChatOpenAI(base_url=checks.BASE_URL, api_key="none", model=checks.MODEL, temperature=0)
tools_model = ChatOpenAI(base_url=checks.TOOLS_BASE_URL, api_key="none", model=checks.MODEL)
runner = asyncio.Runner()  # the asynchronous connections belong to one event loop


class RecordHolder(BaseModel):
    """Who has the record."""

    name: str
    points: int


def get_weather(city: str) -> str:
    """Returns the weather in a city."""
    assert city == "Paris"
    return checks.WEATHER


def last_text(state: dict) -> str:
    """Returns the answer of an agent, which must have called the tool exactly once."""
    assert [message.type for message in state["messages"]] == ["human", "ai", "tool", "ai"], state
    return state["messages"][-1].content


@checks.check("chat")
def chat() -> None:
    checks.check_text(model.invoke(checks.QUESTION).content)


@checks.check("streamed chat")
def stream() -> None:
    deltas = [delta.content for delta in model.stream(checks.QUESTION)]
    assert len(deltas) > 1
    checks.check_text("".join(deltas))


@checks.check("async chat")
def chat_async() -> None:
    async def answer() -> str:
        return (await model.ainvoke(checks.QUESTION)).content

    checks.check_text(runner.run(answer()))


@checks.check("async streamed chat")
def stream_async() -> None:
    async def answer() -> str:
        return "".join([delta.content async for delta in model.astream(checks.QUESTION)])

    checks.check_text(runner.run(answer()))


@checks.check("several chats at once")
def batch() -> None:
    for answer in model.batch([checks.QUESTION] * 3):
        checks.check_text(answer.content)


@checks.check("completions")
def completions() -> None:
    completion_model = OpenAI(base_url=checks.BASE_URL, api_key="none", model=checks.MODEL, max_tokens=8)
    assert completion_model.invoke("Hello.")


@checks.check("token usage")
def usage() -> None:
    answer = model.invoke(checks.QUESTION).usage_metadata
    deltas = model.stream(checks.QUESTION, stream_usage=True)  # the default for servers other than OpenAI's is no usage
    *_, streamed = [delta.usage_metadata for delta in deltas if delta.usage_metadata]
    for counts in (answer, streamed):
        assert counts["input_tokens"] > 0 and counts["output_tokens"] > 0, counts
        assert counts["total_tokens"] == counts["input_tokens"] + counts["output_tokens"], counts


@checks.check("tools")
def tools() -> None:
    (call,) = tools_model.bind_tools([get_weather]).invoke(checks.QUESTION).tool_calls
    assert call["name"] == "get_weather" and call["args"] == {"city": "Paris"}, call


@checks.check("agent with a tool")
def agent() -> None:
    checks.check_weather(
        last_text(create_agent(tools_model, tools=[get_weather], system_prompt="Answer briefly.").invoke(QUESTION))
    )


@checks.check("streamed agent with a tool")
def stream_agent() -> None:
    agent = create_agent(tools_model, tools=[get_weather], system_prompt="Answer briefly.")
    deltas = [delta for delta, _ in agent.stream(QUESTION, stream_mode="messages") if delta.type == "AIMessageChunk"]
    assert len(deltas) > 2
    checks.check_weather("".join(delta.content for delta in deltas))


@checks.check("async agent with a tool")
def agent_async() -> None:
    state = runner.run(
        create_agent(tools_model, tools=[get_weather], system_prompt="Answer briefly.").ainvoke(QUESTION)
    )
    checks.check_weather(last_text(state))


@checks.rejected("structured output", "response_format")
def structured() -> None:
    model.with_structured_output(RecordHolder).invoke(checks.QUESTION)


@checks.rejected("structured output of an agent", "tool_choice")
def structured_agent() -> None:
    create_agent(tools_model, tools=[get_weather], response_format=RecordHolder).invoke(QUESTION)


@checks.rejected("required tools", "tool_choice")
def required_tools() -> None:
    tools_model.bind_tools([get_weather], tool_choice="required").invoke(checks.QUESTION)


checks.main()
