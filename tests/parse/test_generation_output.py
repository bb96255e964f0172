"""What a call returns, and how a notebook shows it."""

import re
from html.parser import HTMLParser

from parse.events import Fallback, Finished, Stage, TextDelta, Usage, Verification
from parse.generation_output import GenerationOutput, Segment, describe_usage
from parse.types import Logprob, SpeculationStats

USAGE = Usage("rounds", draft_tokens=5, accepted_tokens=3, target_tokens=2, rounds=2)


def verification(start, draft, accepted, rejected_text):
    return Verification(start, tuple(draft), (len(draft),), (0.5,), accepted, rejected_text)


EVENTS = [
    verification(0, [9], 0, "nothing <b>right</b>"),
    TextDelta("two ", (1,), "target", (Logprob(-0.1),)),
    TextDelta("and ", (2, 3), "draft", (Logprob(-0.2), Logprob(-0.3))),
    verification(1, [2, 3, 7], 2, "tree"),
    TextDelta("three", (4,), "target", (Logprob(-0.4),)),
    TextDelta(" & <four>", (5,), "draft", (Logprob(-0.5),)),
    verification(4, [5, 8], 1, "five"),
    Finished("stop", USAGE),
]


def output(events=EVENTS, *, has_logprobs=False):
    return GenerationOutput.from_events(events, [100, 101], has_logprobs=has_logprobs)


def test_the_events_become_one_answer():
    answer = output(has_logprobs=True)
    assert answer.text == str(answer) == "two and three & <four>"
    assert answer.token_ids == (1, 2, 3, 4, 5) and answer.prompt_token_ids == (100, 101)
    assert answer.segments == (
        Segment("two ", "target", (1,)),
        Segment("and ", "draft", (2, 3)),
        Segment("three", "target", (4,)),
        Segment(" & <four>", "draft", (5,)),
    )
    assert [item.rejected_text for item in answer.verifications] == ["nothing <b>right</b>", "tree", "five"]
    assert answer.finish_reason == "stop" and answer.usage == USAGE
    assert answer.logprobs is not None and [item.logprob for item in answer.logprobs] == [-0.1, -0.2, -0.3, -0.4, -0.5]


def test_without_a_request_for_logprobs_there_are_none():
    assert output().logprobs is None


def test_deltas_of_one_model_are_one_segment_unless_text_was_rejected_between_them():
    deltas = [TextDelta("a", (1,), "draft"), TextDelta("b", (2,), "draft")]
    joined = output([*deltas, Finished("stop", USAGE)])
    assert joined.segments == (Segment("ab", "draft", (1, 2)),)
    split = output([deltas[0], verification(0, [1, 7], 1, "x"), deltas[1], Finished("stop", USAGE)])
    assert [segment.text for segment in split.segments] == ["a", "b"]
    passed = output([deltas[0], verification(0, [1], 1, ""), deltas[1], Finished("stop", USAGE)])
    assert [segment.text for segment in passed.segments] == ["ab"]


class Parser(HTMLParser):
    """Collects the tags and the text, and checks that all tags are closed."""

    def __init__(self, html):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1], data))


def test_a_notebook_shows_which_model_wrote_what():
    html = output()._repr_html_()
    parsed = Parser(html)
    assert parsed.tags == {"div", "span", "del", "br"}  # neither scripts nor tags from the text
    assert parsed.texts[:7] == [
        ("del", "nothing <b>right</b>"),
        ("span", "two "),
        ("span", "and "),
        ("del", "tree"),
        ("span", "three"),
        ("span", " & <four>"),
        ("del", "five"),
    ]
    titles = re.findall(r'title="([^"]*)"', html)
    rejected, target, draft = "draft, rejected", "written by the target", "draft, accepted"
    assert titles[:7] == [rejected, target, draft, rejected, target, draft, rejected]
    assert {text for _, text in parsed.texts[7:]} >= {rejected, target, draft}
    assert parsed.texts[-1][1] == describe_usage(USAGE)


def test_colors_work_in_light_and_in_dark_themes():
    html = output()._repr_html_()
    assert not re.search(r"(?<![-\w])color:(?!inherit)", html)
    assert all(0 < float(alpha) < 1 for alpha in re.findall(r"rgba\([\d,]+,([\d.]+)\)", html))
    assert re.findall(r"background:(\w+)\(", html).count("rgba") == html.count("background:")


def test_a_notebook_does_not_typeset_dollar_signs_as_formulas():
    html = output([TextDelta("$5 and $6", (1,), "target"), Finished("stop", USAGE)])._repr_html_()
    assert "$5 and $6" in html
    assert re.match(r'<div class="tex2jax_ignore mathjax_ignore"', html)  # around everything


def test_the_representation_is_short():
    long = output([TextDelta("word " * 1000, (1,), "target"), Finished("length", USAGE)])
    assert len(repr(long)) < 250 and "finish_reason='length'" in repr(long) and "accepted_tokens=3" in repr(long)
    assert repr(output()).startswith("GenerationOutput('two and three & <four>', ")


def test_the_usage_line_names_the_counts_and_the_times():
    assert describe_usage(Usage("off", target_tokens=7, total_s=0.5)) == (
        "mode off; the target generated 7; draft 0 ms, judge 0 ms, write 0 ms, total 500 ms"
    )
    usage = Usage(
        "full",
        draft_tokens=5,
        accepted_tokens=3,
        target_tokens=2,
        rounds=1,
        stages=(Stage("draft", 0.0, 0.25),),
        total_s=1.0,
        fallback=Fallback("slow", "the drafter took longer than 1 s"),
        speculation=SpeculationStats("ngram", passes=1),
    )
    assert describe_usage(usage) == (
        "mode full; accepted 3 of 5 draft tokens in 1 round(s); the target generated 2 in 1 passes by ngram; "
        "draft 250 ms, judge 0 ms, write 0 ms, total 1000 ms; the drafter took longer than 1 s"
    )
