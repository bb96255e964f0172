"""LlamaIndex, with its model for OpenAI-compatible servers."""

import asyncio

import checks
from llama_index.core.agent.workflow import AgentStream, FunctionAgent
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

TASK = "What is the weather in Paris?"
MESSAGES = [ChatMessage(role="user", content=checks.QUESTION)]
model = OpenAILike(model=checks.MODEL, api_base=checks.BASE_URL, api_key="none", is_chat_model=True, temperature=0)
tools_model = OpenAILike(
    model=checks.MODEL,
    api_base=checks.TOOLS_BASE_URL,
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
)
runner = asyncio.Runner()  # the connections belong to one event loop


class RecordHolder(BaseModel):
    """Who has the record."""

    name: str
    points: int


def get_weather(city: str) -> str:
    """Returns the weather in a city."""
    assert city == "Paris"
    return checks.WEATHER


def weather_agent() -> FunctionAgent:
    return FunctionAgent(tools=[get_weather], llm=tools_model, system_prompt="Answer briefly.")


@checks.check("chat")
def chat() -> None:
    checks.check_text(model.chat(MESSAGES).message.content)


@checks.check("streamed chat")
def stream() -> None:
    deltas = [delta.delta for delta in model.stream_chat(MESSAGES)]
    assert len(deltas) > 1
    checks.check_text("".join(deltas))


@checks.check("async chat")
def chat_async() -> None:
    async def answer() -> str:
        return (await model.achat(MESSAGES)).message.content

    checks.check_text(runner.run(answer()))


@checks.check("async streamed chat")
def stream_async() -> None:
    async def answer() -> str:
        return "".join([delta.delta async for delta in await model.astream_chat(MESSAGES)])

    checks.check_text(runner.run(answer()))


@checks.check("text completion through chat")
def complete() -> None:
    checks.check_text(model.complete(checks.QUESTION).text)


@checks.check("completions")
def completions() -> None:
    completion_model = OpenAILike(model=checks.MODEL, api_base=checks.BASE_URL, api_key="none", max_tokens=8)
    assert completion_model.complete("Hello.").text
    assert "".join(delta.delta for delta in completion_model.stream_complete("Hello."))


@checks.check("conversation")
def conversation() -> None:
    engine = SimpleChatEngine.from_defaults(llm=tools_model)
    for _ in range(2):
        assert engine.chat("Hello.").response.startswith("I will look.")


@checks.check("token usage")
def usage() -> None:
    counts = model.chat(MESSAGES).raw.usage
    assert counts.prompt_tokens > 0 and counts.completion_tokens > 0, counts


@checks.check("tools")
def tools() -> None:
    tool = FunctionTool.from_defaults(get_weather)
    calls = tools_model.get_tool_calls_from_response(tools_model.chat_with_tools([tool], user_msg=TASK))
    assert [(call.tool_name, call.tool_kwargs) for call in calls] == [("get_weather", {"city": "Paris"})], calls
    checks.check_weather(tools_model.predict_and_call([tool], user_msg=TASK).response)


@checks.check("agent with a tool")
def agent_with_tool() -> None:
    async def answer() -> str:
        return (await weather_agent().run(TASK)).response.content

    text = runner.run(answer())
    checks.check_weather(text)
    assert text != checks.WEATHER, "the model was not called with the result"


@checks.check("streamed agent with a tool")
def stream_agent() -> None:
    async def text() -> str:
        events = weather_agent().run(TASK).stream_events()
        return "".join([event.delta async for event in events if isinstance(event, AgentStream)])

    checks.check_weather(runner.run(text()))


@checks.rejected("structured output", "tool_choice")
def structured() -> None:
    tools_model.as_structured_llm(RecordHolder).complete(checks.QUESTION)


@checks.rejected("required tools", "tool_choice")
def required_tools() -> None:
    tools_model.chat_with_tools([FunctionTool.from_defaults(get_weather)], user_msg=TASK, tool_required=True)


checks.main()
