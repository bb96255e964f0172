import json

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deployments.api.reports import build_report
from deployments.api.request_models import StreamOptions
from deployments.api.responses import ChatResponseBuilder, CompletionResponseBuilder, ResponseContext, format_sse
from deployments.api.token_text import TokenText
from deployments.observability.choice_state import ChoiceState
from deployments.session import Session
from parse.events import Event, Finished, TextDelta, Usage
from parse.types import Logprob, SpeculationStats


def response_context(*, trace: bool = False, **stream_options: bool) -> ResponseContext:
    return ResponseContext(
        model="m", prompt_lengths=[3], trace=trace, stream_options=StreamOptions(**stream_options), best_of=None, id="x"
    )


def choice_state(*events: Event) -> ChoiceState:
    choice = ChoiceState(0, 3, Session("k"), arrival_time=0.0)
    for event in events:
        choice.add_event(event)
    return choice


def data(sent: str | None) -> dict:
    assert sent is not None and sent.startswith("data: ") and sent.endswith("\n\n") and sent.count("\n") == 2
    body: dict = json.loads(sent.removeprefix("data: "))
    return body


# Single tokens.


@pytest.fixture(scope="module")
def spaced() -> PreTrainedTokenizerBase:
    """Returns a tokenizer whose texts lose the space before their first word."""
    words = {"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_token_keeps_the_space_that_it_has_within_a_text(spaced):
    assert spaced.decode([2]) == "b"  # decoded alone, the token has no space
    vocabulary = TokenText(spaced)
    assert [vocabulary.decode(token) for token in (1, 2, 3)] == [" a", " b", "c"]
    assert vocabulary.decode_bytes(2) == [32, 98]


def test_the_texts_of_single_tokens_form_the_whole_text(tokenizer):
    text = "First, Uma 73 — naïve.\nStep 2:"
    ids = tokenizer.encode(text, add_special_tokens=False)
    vocabulary = TokenText(tokenizer)
    response = [token for token in ids if vocabulary.decode_bytes(token) is not None]
    assert len(response) < len(ids)  # some tokens contain only a part of a character
    assert all(bytes(vocabulary.decode_bytes(token) or []).decode() == vocabulary.decode(token) for token in response)
    plain = tokenizer.encode("First, Uma 73.\nStep 2:", add_special_tokens=False)
    assert "".join(map(vocabulary.decode, plain)) == "First, Uma 73.\nStep 2:"


def test_special_tokens_have_a_text_too(tokenizer):
    assert TokenText(tokenizer).decode(tokenizer.eos_token_id) == tokenizer.eos_token


# Chunks of streams.


@pytest.mark.parametrize("text", ["\u2028", "a\x85b", "\x0b\x0c\x1c", "\r\n", "\n\ndata: [DONE]\n\n", "é\U0001f600"])
def test_any_text_is_sent_as_one_event(text):
    sent = format_sse({"text": text})
    (line, _) = httpx.Response(200, content=sent.encode()).iter_lines()  # characters at which Python ends a line
    assert json.loads(line.removeprefix("data: ")) == {"text": text} == data(sent)


@pytest.mark.parametrize("builder_class", [ChatResponseBuilder, CompletionResponseBuilder])
def test_deltas_without_text_are_sent_only_with_a_trace_or_logprobs(tokenizer, builder_class):
    half_character = TextDelta("", (200,), "draft")  # half a character
    vocabulary = TokenText(tokenizer)
    assert (
        builder_class(response_context(), vocabulary).event_chunk(choice_state(half_character), half_character) is None
    )
    sent = data(
        builder_class(response_context(trace=True), vocabulary).event_chunk(
            choice_state(half_character), half_character
        )
    )
    assert sent["parse"] == {"piece": {"text": "", "origin": "draft", "tokens": 1}}
    with_logprobs = TextDelta("", (200,), "draft", (Logprob(-0.5),))
    assert data(builder_class(response_context(), vocabulary).event_chunk(choice_state(with_logprobs), with_logprobs))[
        "choices"
    ][0]["logprobs"]


@pytest.mark.parametrize("builder_class", [ChatResponseBuilder, CompletionResponseBuilder])
def test_a_log_probability_of_minus_infinity_is_sent_as_a_number(tokenizer, builder_class):
    impossible = TextDelta("x", (300,), "target", (Logprob(float("-inf"), ((301, float("-inf")),)),))
    done = Finished("stop", Usage("off", target_tokens=1))
    for sent in (
        data(builder_class(response_context(), TokenText(tokenizer)).event_chunk(choice_state(impossible), impossible)),
        json.loads(
            builder_class(response_context(), TokenText(tokenizer))
            .build_response([choice_state(impossible, done)])
            .model_dump_json()
        ),
    ):
        assert "-9999.0" in json.dumps(sent) and "Infinity" not in json.dumps(sent)


def test_the_queueing_time_is_part_of_all_times():
    choice = choice_state(
        TextDelta("x", (300,), "target"), Finished("stop", Usage("off", target_tokens=1, ttft_s=0.5, total_s=1.0))
    )
    choice.queue_s = 2.0
    report = build_report(choice, trace=False)
    assert (report.first_s, report.total_s) == (2.5, 3.0)
    assert [(stage.name, stage.start, stage.end) for stage in report.stages] == [("queue", 0.0, 2.0)]


def test_the_report_counts_proposals_by_position():
    usage = Usage(
        "rounds",
        draft_tokens=9,
        accepted_tokens=4,
        target_tokens=10,
        speculation=SpeculationStats("eagle3", 4, (4, 2), (3, 2)),
    )
    report = build_report(choice_state(Finished("stop", usage)), trace=False).speculation
    assert report is not None
    positions = [{"proposed": 4, "accepted": 3, "share": 0.75}, {"proposed": 2, "accepted": 2, "share": 1.0}]
    counted = {"method": "eagle3", "passes": 4, "tokens": 10, "proposed": 6, "accepted": 5, "places": positions}
    assert report.model_dump() == counted | {"tokens_per_pass": 2.5}


def test_the_report_of_a_method_without_proposals_has_its_passes():
    usage = Usage("off", target_tokens=3, speculation=SpeculationStats("ngram", 3))
    report = build_report(choice_state(Finished("stop", usage)), trace=False)
    assert report.speculation is not None and (report.speculation.tokens_per_pass, report.speculation.places) == (
        1.0,
        [],
    )


def test_the_report_without_a_method_is_null():
    assert build_report(choice_state(Finished("stop", Usage("off", target_tokens=3))), trace=False).speculation is None


def test_an_empty_answer_is_a_valid_response(tokenizer):
    response = ChatResponseBuilder(response_context(), TokenText(tokenizer)).build_response(
        [choice_state(Finished("stop", Usage("off")))]
    )
    assert response.choices[0].message.content == "" and response.usage.completion_tokens == 0


# Reasoning.


def test_reasoning_is_a_field_beside_the_content(tokenizer):
    events: list[Event] = [
        TextDelta("", (1, 2), "target", reasoning="First"),
        TextDelta("It is", (3, 4), "target", reasoning=" one."),
        TextDelta(" 56.", (5,), "target"),
        Finished("stop", Usage(mode="off", target_tokens=5)),
    ]
    builder = ChatResponseBuilder(response_context(), TokenText(tokenizer))
    choice = choice_state(*events)
    (response_choice,) = builder.build_response([choice]).choices
    message = response_choice.message
    assert (message.reasoning_content, message.content) == ("First one.", "It is 56.")
    deltas = [data(builder.event_chunk(choice, event))["choices"][0]["delta"] for event in events]
    assert deltas == [
        {"reasoning_content": "First"},
        {"reasoning_content": " one.", "content": "It is"},
        {"content": " 56."},
        {},
    ]


def test_without_reasoning_the_field_is_null(tokenizer):
    choice = choice_state(TextDelta("56", (3,), "target"), Finished("stop", Usage(mode="off", target_tokens=1)))
    (response_choice,) = ChatResponseBuilder(response_context(), TokenText(tokenizer)).build_response([choice]).choices
    assert response_choice.message.reasoning_content is None


@pytest.mark.parametrize("builder_class", [ChatResponseBuilder, CompletionResponseBuilder])
def test_chunks_contain_the_usage_so_far_if_requested(builder_class, tokenizer):
    context = response_context(include_usage=True, continuous_usage_stats=True)
    builder = builder_class(context, TokenText(tokenizer))
    choice, counts = choice_state(), []
    for delta in (TextDelta("a", (1,), "target"), TextDelta("bc", (2, 3), "target")):
        choice.add_event(delta)
        counts.append(data(builder.event_chunk(choice, delta))["usage"])
    assert counts == [
        {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens} for tokens in (1, 3)
    ]


@pytest.mark.parametrize("builder_class", [ChatResponseBuilder, CompletionResponseBuilder])
def test_obfuscated_chunks_hide_the_lengths_of_their_texts(builder_class, tokenizer):
    builder = builder_class(response_context(include_obfuscation=True), TokenText(tokenizer))
    lengths = set()
    for length in range(1, 60):
        delta = TextDelta("x" * length, (1,), "target")
        chunk = builder.event_chunk(choice_state(delta), delta)
        assert isinstance(data(chunk)["obfuscation"], str)
        lengths.add(len(chunk))
    assert len({length % 32 for length in lengths}) == 1 and len(lengths) <= 5
