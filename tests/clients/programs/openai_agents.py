"""The Agents SDK of OpenAI, with its model for chat completions."""

import asyncio
import os

import checks

os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    handoff,
)
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel

TASK = "What is the weather in Paris?"
client = AsyncOpenAI(base_url=checks.BASE_URL, api_key="none")
tools_client = AsyncOpenAI(base_url=checks.TOOLS_BASE_URL, api_key="none")
model = OpenAIChatCompletionsModel(model=checks.MODEL, openai_client=client)
tools_model = OpenAIChatCompletionsModel(model=checks.MODEL, openai_client=tools_client)
solver = Agent(name="solver", model=model, model_settings=ModelSettings(temperature=0))
loop = asyncio.new_event_loop()  # the connections belong to one event loop
asyncio.set_event_loop(loop)


class RecordHolder(BaseModel):
    """Who has the record."""

    name: str
    points: int


def get_weather(city: str) -> str:
    """Returns the weather in a city."""
    assert city == "Paris"
    return checks.WEATHER


def weather_agent(*, strict: bool = False) -> Agent:
    return Agent(
        name="weather",
        instructions="Answer briefly.",
        model=tools_model,
        tools=[function_tool(get_weather, strict_mode=strict)],
    )


async def streamed_text(agent: Agent, task: str) -> str:
    """Returns the text deltas of all turns."""
    events = Runner.run_streamed(agent, task).stream_events()
    data = [event.data async for event in events if event.type == "raw_response_event"]
    return "".join(each.delta for each in data if isinstance(each, ResponseTextDeltaEvent))


@checks.check("chat")
def chat() -> None:
    checks.check_text(Runner.run_sync(solver, checks.QUESTION).final_output)


@checks.check("streamed chat")
def stream() -> None:
    checks.check_text(loop.run_until_complete(streamed_text(solver, checks.QUESTION)))


@checks.check("async chat")
def chat_async() -> None:
    checks.check_text(loop.run_until_complete(Runner.run(solver, checks.QUESTION)).final_output)


@checks.check("token usage")
def usage() -> None:
    counts = Runner.run_sync(solver, checks.QUESTION).context_wrapper.usage
    assert counts.input_tokens > 0 and counts.output_tokens > 0, counts
    assert counts.total_tokens == counts.input_tokens + counts.output_tokens, counts


@checks.check("agent with a tool that is not strict")
def agent_with_tool() -> None:
    run = Runner.run_sync(weather_agent(), TASK)
    assert len(run.raw_responses) == 2, run.raw_responses
    checks.check_weather(run.final_output)


@checks.check("streamed agent with a tool that is not strict")
def stream_agent() -> None:
    checks.check_weather(loop.run_until_complete(streamed_text(weather_agent(), TASK)))


@checks.check("handoffs that are not strict")
def handoffs() -> None:
    expert = Agent(name="expert", model=tools_model)
    to_expert = handoff(expert, tool_name_override="get_weather")  # the model calls the tool with this name
    to_expert.strict_json_schema = False
    run = Runner.run_sync(Agent(name="triage", model=tools_model, handoffs=[to_expert]), TASK)
    assert run.last_agent is expert, run.last_agent
    assert "expert" in run.final_output, run.final_output


@checks.rejected("agent with a strict tool", "tools[0].function.strict")
def agent_with_strict_tool() -> None:
    Runner.run_sync(weather_agent(strict=True), TASK)


@checks.rejected("structured output", "response_format")
def structured() -> None:
    Runner.run_sync(Agent(name="solver", model=model, output_type=RecordHolder), checks.QUESTION)


@checks.rejected("required tools", "tool_choice")
def required_tools() -> None:
    agent = weather_agent().clone(model_settings=ModelSettings(tool_choice="required"))
    Runner.run_sync(agent, TASK)


@checks.rejected("Responses API", "/v1/responses")
def responses() -> None:
    responses_model = OpenAIResponsesModel(model=checks.MODEL, openai_client=client)
    Runner.run_sync(Agent(name="solver", model=responses_model), checks.QUESTION)


checks.main()
