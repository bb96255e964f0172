"""Pydantic AI, with its chat model for OpenAI."""

import asyncio

import checks
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.profiles.openai import OpenAIModelProfile
from pydantic_ai.providers.openai import OpenAIProvider

TASK = "What is the weather in Paris?"
tools_provider = OpenAIProvider(base_url=checks.TOOLS_BASE_URL, api_key="none")
tools_model = OpenAIChatModel(checks.MODEL, provider=tools_provider)
model = OpenAIChatModel(checks.MODEL, provider=OpenAIProvider(base_url=checks.BASE_URL, api_key="none"))
solver = Agent(model, model_settings={"temperature": 0})
runner = asyncio.Runner()  # the connections belong to one event loop
asyncio.set_event_loop(runner.get_loop())


class RecordHolder(BaseModel):
    """Who has the record."""

    name: str
    points: int


def get_weather(city: str) -> str:
    """Returns the weather in a city."""
    assert city == "Paris"
    return checks.WEATHER


@checks.check("chat")
def chat() -> None:
    checks.check_text(solver.run_sync(checks.QUESTION).output)


@checks.check("streamed chat")
def stream() -> None:
    async def deltas() -> list[str]:
        async with solver.run_stream(checks.QUESTION) as answer:
            return [delta async for delta in answer.stream_text(delta=True, debounce_by=None)]

    texts = runner.run(deltas())
    assert len(texts) > 1
    checks.check_text("".join(texts))


@checks.check("async chat")
def chat_async() -> None:
    checks.check_text(runner.run(solver.run(checks.QUESTION)).output)


@checks.check("conversation")
def conversation() -> None:
    first = solver.run_sync(checks.QUESTION)
    second = Agent(tools_model).run_sync("Thanks.", message_history=first.all_messages())
    assert second.output.startswith("I will look."), second.output


@checks.check("token usage")
def usage() -> None:
    async def streamed() -> object:
        async with solver.run_stream(checks.QUESTION) as answer:
            await answer.get_output()
            return answer.usage

    for counts in (solver.run_sync(checks.QUESTION).usage, runner.run(streamed())):
        assert counts.input_tokens > 0 and counts.output_tokens > 0, counts


def weather_agent() -> Agent:
    profile = OpenAIModelProfile(openai_supports_strict_tool_definition=False)
    flexible_model = OpenAIChatModel(checks.MODEL, provider=tools_provider, profile=profile)
    return Agent(flexible_model, tools=[get_weather], instructions="Answer briefly.")


@checks.check("agent with a tool that is not strict")
def agent_with_tool() -> None:
    run = weather_agent().run_sync(TASK)
    assert run.usage.requests == 2, run.usage
    checks.check_weather(run.output)


@checks.check("streamed agent with a tool that is not strict")
def stream_agent() -> None:
    async def text() -> str:
        result = None
        async with weather_agent().run_stream_events(TASK) as events:
            async for event in events:
                result = getattr(event, "result", result)
        return result.output

    checks.check_weather(runner.run(text()))


@checks.rejected("agent with a strict tool", "tools[0].function.strict")
def agent_with_strict_tool() -> None:
    Agent(tools_model, tools=[get_weather], instructions="Answer briefly.").run_sync(TASK)


@checks.rejected("structured output", "tools[0].function.strict")
def structured() -> None:
    Agent(tools_model, output_type=RecordHolder).run_sync(checks.QUESTION)


@checks.rejected("JSON mode", "response_format")
def json_mode() -> None:
    Agent(model, output_type=PromptedOutput(RecordHolder)).run_sync(checks.QUESTION)


@checks.rejected("JSON schema mode", "response_format")
def json_schema_mode() -> None:
    Agent(model, output_type=NativeOutput(RecordHolder)).run_sync(checks.QUESTION)


checks.main()
