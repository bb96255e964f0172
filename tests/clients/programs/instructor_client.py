"""instructor, around the official client of OpenAI."""

import asyncio
from collections.abc import Iterable

import checks
import instructor
from instructor.core.exceptions import InstructorRetryException
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ValidationError

MESSAGES = [{"role": "user", "content": checks.QUESTION}]
# The model of the tools repeats what is in this block.
JSON_MESSAGES = [{"role": "user", "content": '<tool_response>```json\n{"city": "Paris"}\n```</tool_response>'}]
client = OpenAI(base_url=checks.BASE_URL, api_key="none", max_retries=0)
tools_client = OpenAI(base_url=checks.TOOLS_BASE_URL, api_key="none", max_retries=0)


class Weather(BaseModel):
    """A city."""

    city: str


class GetWeather(BaseModel):
    """Returns the weather in a city."""

    city: str


GetWeather.__name__ = "get_weather"  # the name of the tool


def with_mode(client: OpenAI, mode: instructor.Mode) -> Weather:
    return instructor.from_openai(client, mode=mode).create(
        model=checks.MODEL, messages=JSON_MESSAGES, response_model=Weather, max_retries=0
    )


@checks.check("chat")
def chat() -> None:
    answer = instructor.from_openai(client).create(
        model=checks.MODEL, messages=MESSAGES, response_model=None, temperature=0
    )
    checks.check_text(answer.choices[0].message.content)


@checks.check("structured output in the text")
def markdown() -> None:
    assert with_mode(tools_client, instructor.Mode.MD_JSON).city == "Paris"


@checks.check("streamed structured output in the text")
def stream_markdown() -> None:
    *_, last = instructor.from_openai(tools_client, mode=instructor.Mode.MD_JSON).create_partial(
        model=checks.MODEL, messages=JSON_MESSAGES, response_model=Weather, max_retries=0
    )
    assert last.city == "Paris", last


@checks.check("async structured output in the text")
def markdown_async() -> None:
    async_client = AsyncOpenAI(base_url=checks.TOOLS_BASE_URL, api_key="none", max_retries=0)
    creation = instructor.from_openai(async_client, mode=instructor.Mode.MD_JSON).create(
        model=checks.MODEL, messages=JSON_MESSAGES, response_model=Weather, max_retries=0
    )
    assert asyncio.run(creation).city == "Paris"


@checks.check("retries after invalid output")
def retries() -> None:
    try:
        instructor.from_openai(tools_client, mode=instructor.Mode.MD_JSON).create(
            model=checks.MODEL, messages=[{"role": "user", "content": "Hello."}], response_model=Weather, max_retries=1
        )
    except InstructorRetryException as error:
        errors = [attempt.exception for attempt in error.failed_attempts]
        assert len(errors) == 2 and all(isinstance(each, ValidationError) for each in errors), errors
    else:
        raise AssertionError("the model wrote JSON")


@checks.check("tools")
def tools() -> None:
    (weather,) = instructor.from_openai(tools_client, mode=instructor.Mode.PARALLEL_TOOLS).create(
        model=checks.MODEL, messages=MESSAGES, response_model=Iterable[GetWeather], max_retries=0
    )
    assert weather == GetWeather(city="Paris"), weather


@checks.rejected("structured output", "tool_choice")
def structured() -> None:
    with_mode(tools_client, instructor.Mode.TOOLS)


@checks.rejected("JSON mode", "response_format")
def json_mode() -> None:
    with_mode(client, instructor.Mode.JSON)


@checks.rejected("JSON schema mode", "response_format")
def json_schema_mode() -> None:
    with_mode(client, instructor.Mode.JSON_SCHEMA)


checks.main()
