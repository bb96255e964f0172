import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse

from bench.client import RequestParams, RequestResult, ServerReport, TimedResponse, open_client, send_request
from bench.comparison import compare_runs, fastest_sentences, summary_table, table
from bench.latency import BenchmarkRun, OfferedLoad, Round, overlap_s, percentile, spread, summarize
from bench.load import closed_loop, main, open_loop, poisson_arrivals, with_contender
from bench.workload import InvalidPromptFile, SampleRequest, demo_requests, load_requests, number_prompts, replace_names
from deployments.api.routes import create_app
from deployments.config import ApiSettings
from parse.config import EngineSettings
from parse.demo import DEMO_DRAFT, DEMO_TARGET
from parse.pair import Pair
from tests.deployments.live import PATIENCE_S, LocalBackend, served
from training import measure
from training.confidence import rounds_interval
from training.task import correct_answer, draw_problem

SPREADS = "ttft_s", "itl_s", "latency_s"


@pytest.fixture(scope="module")
def server():
    target, draft = (EngineSettings(model=model, num_threads=1) for model in (DEMO_TARGET, DEMO_DRAFT))
    with (
        Pair(target, draft) as pair,
        served(create_app(LocalBackend(pair.pipeline), ApiSettings(), "demo-target")) as url,
    ):
        yield url


def load(*options):
    command = [sys.executable, "-m", "bench.load", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def load_figures(*options):
    done = load(*options, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# The command, with a server of the demo pair.


@pytest.mark.slow
def test_modes_are_compared_on_the_same_problems(server, tmp_path):
    path, picture = tmp_path / "load.json", tmp_path / "load.svg"
    options = ("--requests", 4, "--concurrency", "1,2", "--compare", "off,full", "--rounds", 2, "--seed", 11)
    done = load("--url", server, *options, "--json", path, "--plot", picture)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert [(run["mode"], run["concurrency"]) for run in figures["runs"]] == [
        ("off", 1),
        ("full", 1),
        ("off", 2),
        ("full", 2),
    ]
    for run in figures["runs"]:
        assert run["requests"] == run["answered"] == 4 and run["errors"] == {} and len(run["rounds"]) == 2
        assert run["answered_as"] == {run["mode"]: 4} and run["rate"] is None
        assert run["requests_per_s"] == pytest.approx(4 / run["wall_s"])
        assert run["tokens_per_s"] == pytest.approx(run["completion_tokens"] / run["wall_s"])
        for name in SPREADS:
            assert 0 <= run[name]["p50"] <= run[name]["p95"] <= run[name]["p99"]
        assert run["ttft_s"]["mean"] <= run["latency_s"]["mean"] and 0 <= run["overlap_share"] <= 1
        assert set(run["stages_s"]) == {"queue", "warm", "draft", "judge", "write"}
        assert sum(run["stages_s"].values()) <= run["latency_s"]["mean"]
    off, full = figures["runs"][:2]
    assert off["accuracy"] == 1.0 and off["accepted_share"] is None and off["stages_s"]["draft"] == 0
    assert 0 < full["accepted_share"] <= 1 and full["stages_s"]["draft"] > 0
    assert off["overlap_share"] == full["overlap_share"] == 0.0  # one request at a time
    assert off["answered_with"] == full["answered_with"] == {"none": 4}  # the server has no methods loaded
    assert figures["served"]["speculation"] == "none" and figures["run"]["seeds"] == [11]
    assert figures["ratios"].keys() == {"1", "2"}
    assert figures["ratios"]["1"]["full"]["tokens_per_s"] == pytest.approx(full["tokens_per_s"] / off["tokens_per_s"])
    assert table(figures) in done.stdout and "| 2 | full |" in done.stdout
    assert "The default is `none`." in summary_table(figures)
    assert picture.read_text().startswith("<?xml")


def test_tokens_are_counted_by_the_server(server):
    figures = load_figures("--url", f"{server}/v1/", "--requests", 3, "--mode", "off", "--warmup", 1, "--seed", 12)
    used = []
    for task in demo_requests(4, seed=12)[1:]:
        body = {"model": "demo-target", "messages": task.messages, "temperature": 0, "parse": {"mode": "off"}}
        used.append(httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60).json()["usage"])
    assert figures["runs"][0]["completion_tokens"] == sum(usage["completion_tokens"] for usage in used)


def test_requests_can_arrive_at_a_rate_without_streaming(server):
    figures = load_figures(
        "--url", server, "--requests", 3, "--rate", 20, "--mode", "full", "--no-stream", "--seed", 13
    )
    (run,) = figures["runs"]
    assert run["rate"] == 20 and run["concurrency"] is None and run["answered"] == 3 and run["tokens_per_s"] > 0
    assert set(run["ttft_s"].values()) == set(run["itl_s"].values()) == {None} and run["latency_s"]["p50"] > 0
    assert figures["ratios"].keys() == {"20/s"}


def test_prompts_can_come_from_a_file(server, tmp_path):
    problem = draw_problem("bench", 14, 0)
    right = re.findall(r"\d+", correct_answer(problem))[-1]  # the result, in any wording
    lines = [
        {"prompt": problem.question, "answer": right},
        {"messages": [{"role": "user", "content": problem.question}], "answer": "no such words"},
        {"prompt": "Hello."},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    figures = load_figures("--url", server, "--prompts", file, "--requests", 3, "--warmup", 0, "--max-tokens", 200)
    (run,) = figures["runs"]
    assert run["answered"] == 3 and run["accuracy"] == 0.5 and run["mode"] == "default"


def test_numbered_prompts_differ_between_contenders_and_keep_the_system_message(tmp_path):
    file = tmp_path / "prompts.jsonl"
    system, text = {"role": "system", "content": "Be brief."}, {"type": "text", "text": "How are you?"}
    lines = [
        {"messages": [system, {"role": "user", "content": "Hello."}, {"role": "user", "content": "Again."}]},
        {"messages": [{"role": "user", "content": [text]}], "answer": "fine"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    requests = load_requests(file, 4)
    numbered = [*number_prompts(requests, "5-1"), *number_prompts(requests, "5-2")]
    assert [request.messages[0] for request in numbered[::2]] == [system] * 4
    texts = [request.messages[1]["content"] for request in numbered[::2]]
    texts += [request.messages[0]["content"][0]["text"] for request in numbered[1::2]]
    assert len(set(texts)) == 8 and all(prompt.startswith("(Request 5-") for prompt in texts)
    assert texts[0].endswith("Hello.") and numbered[0].messages[2]["content"] == "Again."
    assert numbered[1].messages[0]["content"][1] == text and numbered[1].is_correct is requests[1].is_correct
    assert requests[0].messages[1]["content"] == "Hello."


def test_the_result_of_an_answer_under_load_is_its_last_match(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "6 times 7?", "answer": "42"}))
    (request,) = load_requests(file, 1, r"#### (\d+)")
    assert request.is_correct is not None
    assert request.is_correct("#### 41, or rather\n#### 42", True) and not request.is_correct("42 or #### 41", True)


def test_rejected_requests_are_counted_and_shown(server):
    done = load("--url", server, "--requests", 2, "--mode", "brilliant")
    assert done.returncode == 1 and "2 of 400" in done.stdout
    assert "load: 400: parse.mode" in done.stderr and "load: no request was answered" in done.stderr


def test_an_unreachable_server_is_reported_in_one_line():
    done = load("--url", "http://127.0.0.1:9", "--requests", 1)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().startswith("load: http://127.0.0.1:9 cannot be reached")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--requests", 0), "at least 1"),
        (("--concurrency", "1,0"), "different positive numbers"),
        (("--rate", "nan"), "different positive numbers"),
        (("--compare", "off,off"), "different contenders"),
        (("--compare", "off,full", "--mode", "off"), "not allowed with"),
        (("--requests", 2, "--rounds", 3), "more than there are requests"),
        (("--result", "("), "--result: "),
        (("--distinct-prompts",), "need --prompts"),
        (("--json", "/no/such/folder/x.json"), "there is no folder /no/such/folder"),
        (("--url", "nonsense"), "nonsense"),
        (("--url", "http://here:http"), "is not a valid address"),
    ],
)
def test_invalid_options_are_rejected(options, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["load", *map(str, ("--url", "http://127.0.0.1:9", *options))])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code and complaint in f"{stopped.value.code} {capsys.readouterr().err}"


# Errors.


def broken_server():
    """Returns a server that fails in the way that the prompt names."""
    app = FastAPI()

    def event(body):
        return f"data: {json.dumps(body)}\n\n"

    async def stream(command: str) -> AsyncIterator[str]:
        yield event({"choices": [{"delta": {"content": "so far"}, "finish_reason": None}]})
        if command == "cut":
            raise RuntimeError("on purpose")
        if command == "hang":
            await asyncio.Event().wait()  # until the client disconnects
        if command == "error":
            yield event({"error": {"message": "it failed", "type": "server_error", "code": "internal_error"}})
        if command == "garbage":
            yield "data: {\n\n"
        if command not in ("end", "hang"):
            yield "data: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    async def chat(body: dict) -> Response:
        command = body["messages"][0]["content"]
        if command.isdecimal():
            return Response(json.dumps({"error": {"message": "no", "code": "overloaded"}}), int(command))
        return StreamingResponse(stream(command), media_type="text/event-stream")

    return app


def test_errors_are_counted_by_kind():
    commands = "503 503 500 cut hang error garbage end fine".split()

    async def outcomes(url):
        async with open_client(url, None) as client:

            async def send(request, due):
                hangs = request.messages[0]["content"] == "hang"
                params = RequestParams("any", timeout_s=0.5 if hangs else PATIENCE_S)
                return await send_request(client, params, request, due)

            return await closed_loop(send, [SampleRequest([{"role": "user", "content": word}]) for word in commands], 3)

    with served(broken_server()) as url:
        results = asyncio.run(outcomes(url))
    assert summarize([Round(results, 1.0, 0.0)])["errors"] == {
        "503": 2,
        "500": 1,
        "RemoteProtocolError": 1,
        "TimeoutError": 1,
        "internal_error": 1,
        "JSONDecodeError": 1,
        "incomplete": 1,
    }
    details = {outcome.error: outcome.detail for outcome in results}
    assert details["503"] == "no" and details["internal_error"] == "it failed"
    (fine,) = [outcome.response for outcome in results if outcome.response]
    assert fine.text == "so far" and fine.report is None and not fine.ended


# The figures.


def test_percentiles_are_those_of_numpy():
    rng = random.Random(0)
    for count in (1, 2, 3, 10, 101):
        values = sorted(rng.random() for _ in range(count))
        for share in (0.0, 0.5, 0.95, 0.99, 1.0):
            assert percentile(values, share) == pytest.approx(np.percentile(values, share * 100))
    assert spread([3.0, 1.0, 2.0]) == {"mean": 2.0, "p50": 2.0, "p95": pytest.approx(2.9), "p99": pytest.approx(2.98)}


def test_figures_without_data_are_null():
    failed = RequestResult(SampleRequest([]), 0.0, 1.0, error="503")
    figures = summarize([Round([failed], 2.0, 0.1)])
    assert figures["requests"] == 1 and figures["answered"] == 0 and figures["requests_per_s"] == 0.0
    for name in SPREADS:
        assert set(figures[name].values()) == {None}
    assert (
        figures["accuracy"]
        is figures["accepted_share"]
        is figures["overlap_share"]
        is figures["stages_s"]["draft"]
        is None
    )
    assert "| 1 of 503 |" in table(compare_runs([BenchmarkRun("off", OfferedLoad(1), [Round([failed], 2.0, 0.1)])]))


def report(arrived, *stages, drafted=0, accepted=0):
    return ServerReport("full", "none", drafted, accepted, 0, arrived, stages)


def busy(reports, at, *sides):
    return {
        number
        for number, one in enumerate(reports)
        for name, start, end in one.stages
        if name in sides and one.arrived + start <= at < one.arrived + end
    }


def test_overlap_equals_that_of_a_fine_grid():
    rng = random.Random(1)
    names = "queue warm draft judge write".split()
    for _ in range(20):
        reports = []
        for _ in range(rng.randint(1, 6)):
            intervals = [sorted(rng.randrange(100) for _ in range(2)) for _ in range(rng.randint(0, 6))]
            stages = [(rng.choice(names), float(start), float(end)) for start, end in intervals]
            reports.append(report(float(rng.randrange(100)), *stages))
        moments = [step + 0.5 for step in range(200)]  # all changes happen at whole numbers
        together = [
            any(one != other for one in busy(reports, at, "draft") for other in busy(reports, at, "judge", "write"))
            for at in moments
        ]
        assert overlap_s(reports) == pytest.approx(sum(together))


def test_overlap_matches_a_calculation_by_hand():
    first = report(100.0, ("draft", 0.0, 2.0), ("judge", 2.0, 5.0))
    assert overlap_s([first]) == 0.0
    assert overlap_s([first, report(101.0, ("draft", 0.0, 3.0))]) == pytest.approx(2.0)
    own = report(0.0, ("draft", 0.0, 4.0), ("judge", 1.0, 2.0))  # windows of the same draft
    assert overlap_s([own]) == 0.0


def test_figures_match_a_calculation_by_hand():
    def outcome(due, chunk_times, tokens, right, **report_fields):
        response = TimedResponse(
            "text", True, 10, tokens, report(0.0, ("draft", 0.0, 0.5), **report_fields), chunk_times
        )
        return RequestResult(SampleRequest([], lambda text, ended: right), due, chunk_times[-1] + 1.0, response)

    rounds = [
        Round([outcome(0.0, (1.0, 1.5, 3.0), 5, True, drafted=10, accepted=9)], 4.0, 0.4),
        Round([outcome(10.0, (12.0,), 1, False, drafted=30, accepted=1)], 6.0, 0.1),
    ]
    figures = summarize(rounds)
    assert figures["requests_per_s"] == 0.2 and figures["tokens_per_s"] == 0.6
    assert figures["ttft_s"]["mean"] == 1.5 and figures["latency_s"]["mean"] == 3.5
    assert figures["itl_s"]["mean"] == 0.5 and figures["pause_s"]["p99"] == 1.5  # the second answer is a single token
    assert figures["accepted_share"] == 0.25 and figures["accuracy"] == 0.5 and figures["stages_s"]["draft"] == 0.5
    assert figures["client_cpu_share"] == pytest.approx(0.05)


def test_ratios_are_to_the_first_contender_with_a_mean_over_rounds():
    def run(mode, *walls):
        outcome = RequestResult(SampleRequest([]), 0.0, 2.0, TimedResponse("text", True, completion_tokens=10))
        return BenchmarkRun(mode, OfferedLoad(8), [Round([outcome], wall, 0.0) for wall in walls])

    figures = compare_runs([run("off", 1.0, 1.0, 1.0), run("full", 0.5, 0.25, 1.0)])["ratios"]["8"]
    rounds_of_off = figures["off"].pop("rounds")
    assert set(figures["off"].values()) == {1.0} and all(part["mean"] == 1.0 for part in rounds_of_off.values())
    assert figures["full"]["requests_per_s"] == pytest.approx(3 / 1.75) == figures["full"]["tokens_per_s"]
    of_rounds = figures["full"]["rounds"]["requests_per_s"]
    assert of_rounds["values"] == [2.0, 4.0, 1.0] and of_rounds["mean"] == pytest.approx(2.0)
    assert of_rounds["interval"] == rounds_interval([2.0, 4.0, 1.0])


@pytest.mark.parametrize(
    ("contender", "fields"),
    [
        ("default", None),
        ("off", {"mode": "off"}),
        ("off+none", {"mode": "off", "speculation": "none"}),
        ("default+ngram", {"speculation": "ngram"}),
    ],
)
def test_a_contender_is_a_mode_or_a_mode_with_a_method(contender, fields):
    body = with_contender(RequestParams("m"), contender).body(SampleRequest([]))
    assert body.get("parse") == fields


@pytest.mark.parametrize(
    ("load", "phrase"),
    [
        (OfferedLoad(1), "With 1 client"),
        (OfferedLoad(8), "With 8 clients"),
        (OfferedLoad(rate=4.0), "At 4 arrivals per second"),
    ],
)
def test_the_summary_names_the_fastest_contender(load, phrase):
    def run(mode, wall):
        outcome = RequestResult(SampleRequest([]), 0.0, 2.0, TimedResponse("text", True, completion_tokens=10))
        return BenchmarkRun(mode, load, [Round([outcome], wall, 0.0)])

    figures = {"served": None, **compare_runs([run("off", 1.0), run("off+none", 4.0), run("auto", 2.0)])}
    assert fastest_sentences(figures) == [
        f"{phrase}, `off` answers the most requests per second, and `auto` answers 50.0% fewer."
    ]


# How requests are sent.


class Slow:
    """Answers after a delay, and records how many requests run at the same time."""

    def __init__(self) -> None:
        self.num_concurrent = self.max_concurrent = 0

    async def __call__(self, task: SampleRequest, due: float) -> RequestResult:
        self.num_concurrent += 1
        self.max_concurrent = max(self.max_concurrent, self.num_concurrent)
        await asyncio.sleep(0.05)
        self.num_concurrent -= 1
        return RequestResult(task, due, time.perf_counter())


def test_a_closed_loop_keeps_every_client_busy():
    slow = Slow()
    assert len(asyncio.run(closed_loop(slow, [SampleRequest([])] * 7, 3))) == 7 and slow.max_concurrent == 3


def test_after_its_time_a_closed_loop_sends_only_the_first_request_of_each_client():
    slow, requests = Slow(), [SampleRequest([])] * 7
    assert len(asyncio.run(closed_loop(slow, requests, 3, max_s=0.0))) == 3 and slow.max_concurrent == 3
    assert len(asyncio.run(closed_loop(slow, requests, 3, max_s=60.0))) == 7


def test_an_open_loop_does_not_wait_and_counts_from_the_arrival():
    slow, arrivals = Slow(), [0.0, 0.01, 0.02, 0.03]

    async def late(task, due):
        time.sleep(0.05)  # the client is later than its schedule
        return await slow(task, due)

    together = asyncio.run(open_loop(slow, [SampleRequest([])] * 4, arrivals))
    assert [outcome.scheduled_at - together[0].scheduled_at for outcome in together] == pytest.approx(
        arrivals
    ) and slow.max_concurrent == 4
    assert asyncio.run(open_loop(late, [SampleRequest([])] * 4, arrivals))[-1].latency_s > 5 * 0.05 - 0.03


def test_arrivals_are_seeded_and_poisson():
    times = poisson_arrivals(5.0, 20_000, "a")
    assert times == poisson_arrivals(5.0, 20_000, "a") != poisson_arrivals(5.0, 20_000, "b")
    gaps = np.diff([0.0, *times])
    assert (
        gaps.min() >= 0 and gaps.mean() == pytest.approx(0.2, rel=0.03) and gaps.std() == pytest.approx(0.2, rel=0.05)
    )


# The requests.


def test_demo_requests_are_the_problems_of_the_benchmarks():
    problems = measure.draw_problems(3, 6, split="bench")
    tasks = demo_requests(6, seed=3)
    assert [task.messages[0]["content"] for task in tasks] == [problem.question for problem in problems]
    for task, problem, other in zip(tasks, problems, problems[1:] + problems[:1], strict=True):
        assert task.is_correct is not None and task.is_correct(correct_answer(problem), True)
        assert not task.is_correct(correct_answer(problem), False) and not task.is_correct(
            correct_answer(problem)[:-1], True
        )
        assert not task.is_correct(correct_answer(other), True)


def test_another_name_set_changes_only_the_names(tokenizer):
    for index in range(40):
        problem = draw_problem("bench", 3, index)
        other = replace_names(problem, 2)
        sizes = {
            (len(tokenizer.encode(one.question)), len(tokenizer.encode(correct_answer(one))))
            for one in (problem, other)
        }
        assert replace_names(problem, 0) == problem and len(sizes) == 1
        assert other.question.split()[0] != problem.question.split()[0]  # no common prefix that could be cached


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[]", 'must be {"prompt"'),
        ('{"answer": "x"}', 'must be {"prompt"'),
        ('{"prompt": "x", "messages": []}', 'must be {"prompt"'),
        ('{"prompt": ""}', "prompt: must be text"),
        ('{"prompt": 1}', "prompt: must be text"),
        ('{"messages": []}', "messages: must be a list"),
        ('{"messages": ["x"]}', "messages: must be a list"),
        ('{"prompt": "x", "answer": 7}', "answer: must be text"),
        ('{"prompt": "x", "temperature": 1}', "temperature: unknown field"),
    ],
)
def test_an_invalid_line_of_a_file_is_named_by_its_number(tmp_path, line, complaint):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(InvalidPromptFile, match="line 3: ") as refused:
        load_requests(file, 5)
    assert complaint in str(refused.value)


def test_a_short_file_is_repeated_and_an_empty_one_is_rejected(tmp_path):
    file = tmp_path / "prompts.jsonl"
    with pytest.raises(InvalidPromptFile):
        load_requests(file, 1)
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "answer": "yes"}\n')
    tasks = load_requests(file, 3)
    assert [task.messages[0]["content"] for task in tasks] == ["a", "b", "a"]
    assert tasks[0].is_correct is None
    assert (
        tasks[1].is_correct is not None and tasks[1].is_correct("oh yes", False) and not tasks[1].is_correct("no", True)
    )
    file.write_text("\n")
    with pytest.raises(InvalidPromptFile, match="holds no prompt"):
        load_requests(file, 1)
