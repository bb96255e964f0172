"""AutoGen, with its chat client for OpenAI and its assistant agent."""

import asyncio
import os

import checks

os.environ["AUTOGEN_DISABLE_RUNTIME_TRACING"] = "true"

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import ModelClientStreamingChunkEvent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel

MODEL_INFO = {
    "vision": False,
    "function_calling": True,
    "json_output": False,
    "structured_output": False,
    "family": "unknown",
}
TASK = "What is the weather in Paris?"
client = OpenAIChatCompletionClient(
    model=checks.MODEL, base_url=checks.BASE_URL, api_key="none", model_info=MODEL_INFO, temperature=0
)
tools_client = OpenAIChatCompletionClient(
    model=checks.MODEL, base_url=checks.TOOLS_BASE_URL, api_key="none", model_info=MODEL_INFO
)
runner = asyncio.Runner()  # the connections belong to one event loop


class RecordHolder(BaseModel):
    """Who has the record."""

    name: str
    points: int


async def get_weather(city: str) -> str:
    """Returns the weather in a city."""
    assert city == "Paris"
    return checks.WEATHER


@checks.check("chat")
def chat() -> None:
    answer = runner.run(client.create([UserMessage(content=checks.QUESTION, source="user")]))
    checks.check_text(answer.content)


@checks.check("streamed chat")
def stream() -> None:
    async def parts() -> list:
        return [part async for part in client.create_stream([UserMessage(content=checks.QUESTION, source="user")])]

    *deltas, answer = runner.run(parts())
    assert len(deltas) > 1
    checks.check_text("".join(deltas))
    checks.check_text(answer.content)


@checks.check("token usage")
def usage() -> None:
    answer = runner.run(client.create([UserMessage(content=checks.QUESTION, source="user")]))
    assert answer.usage.prompt_tokens > 0 and answer.usage.completion_tokens > 0, answer.usage


@checks.check("agent")
def agent() -> None:
    # The demo pair was not trained with system messages.
    agent = AssistantAgent("solver", client, system_message=None)
    checks.check_text(runner.run(agent.run(task=checks.QUESTION)).messages[-1].content)


@checks.check("agent with a tool")
def agent_with_tool() -> None:
    for option in ({"reflect_on_tool_use": True}, {"max_tool_iterations": 3}):
        agent = AssistantAgent("weather", tools_client, tools=[get_weather], **option)
        messages = runner.run(agent.run(task=TASK)).messages
        types = [message.type for message in messages if message.type.startswith("Tool")]
        assert types == ["ToolCallRequestEvent", "ToolCallExecutionEvent"], messages
        checks.check_weather(messages[-1].content)
        assert messages[-1].content != checks.WEATHER, "the model was not called with the result"


@checks.check("streamed agent with a tool")
def stream_agent() -> None:
    agent = AssistantAgent(
        "weather", tools_client, tools=[get_weather], reflect_on_tool_use=True, model_client_stream=True
    )

    async def deltas() -> list[str]:
        events = agent.run_stream(task=TASK)
        return [event.content async for event in events if isinstance(event, ModelClientStreamingChunkEvent)]

    checks.check_weather("".join(runner.run(deltas())))


@checks.check("team of agents")
def team() -> None:
    agents = [
        AssistantAgent(name, tools_client, tools=[get_weather], reflect_on_tool_use=True)
        for name in ("first", "second")
    ]
    messages = runner.run(RoundRobinGroupChat(agents, max_turns=2).run(task=TASK)).messages
    assert [message.source for message in messages if message.type == "TextMessage"] == ["user", "first", "second"]
    checks.check_weather(messages[-1].content)


@checks.rejected("structured output", "response_format")
def structured() -> None:
    info = MODEL_INFO | {"structured_output": True}
    structured_client = OpenAIChatCompletionClient(
        model=checks.MODEL, base_url=checks.BASE_URL, api_key="none", model_info=info
    )
    agent = AssistantAgent("solver", structured_client, output_content_type=RecordHolder)
    runner.run(agent.run(task=checks.QUESTION))


@checks.rejected("required tools", "tool_choice")
def required_tools() -> None:
    message = UserMessage(content=TASK, source="user")
    tool = FunctionTool(get_weather, description="The weather in a city.")
    runner.run(tools_client.create([message], tools=[tool], tool_choice="required"))


checks.main()
