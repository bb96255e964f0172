"""Tests that one request has one trace over all replicas, and that the trace endpoint may fail."""

import asyncio
import json
import time
from collections import Counter

from tests.deployments.service.conftest import EXPORT_TIMEOUT_S
from tests.deployments.service.service_client import chat, problems, until

EXPECTED_SPANS = Counter(
    {
        "answer": 4,
        "replica_handle_request Router __call__": 4,
        "replica_handle_request Drafter draft_complete": 4,
        "replica_handle_request Verifier verify_and_generate": 2,
        "replica_handle_request Verifier generate": 2,
    }
)


def test_the_trace_of_a_request_contains_router_and_replicas(deployed, spans):
    deployed.clear()  # replicas that already run would continue without tracing
    service = deployed.service(traced=True)
    num_earlier = len(spans.exported)

    async def send_requests():
        for problem, mode in zip(problems(4), ("full", "exact", "full", "exact"), strict=True):
            await service.answer(chat(problem.question, mode=mode))
            async with service.client() as client:
                await client.get("/metrics")

        async def all_exported():  # each process sends its spans at intervals
            names = Counter(span.name for span in spans.exported[num_earlier:])
            return names >= EXPECTED_SPANS

        await until(all_exported)

    asyncio.run(send_requests())
    exported = spans.exported[num_earlier:]
    by_id = {span.id: span for span in exported}

    def within(span):
        """Returns the names of a span's ancestors."""
        names = []
        while (span := by_id.get(span.parent)) is not None:
            names.append(span.name)
        return names

    answers = {span.trace for span in exported if span.name == "answer"}  # the router also asks at its start
    for deployment, method, stage in (
        ("Drafter", "draft_complete", "draft"),
        ("Verifier", "verify_and_generate", "judge"),
        ("Verifier", "generate", "write"),
    ):
        name = f"replica_handle_request {deployment} {method}"
        inner = [span for span in exported if span.name == name and span.trace in answers]
        assert inner, sorted({span.name for span in exported})
        for span in inner:
            assert within(span)[:3] == [f"route_to_replica {deployment} {method}", stage, "answer"]
            assert "replica_handle_request Router __call__" in within(span)
    assert len(answers) == 4
    # Health checks and scrapes, which happen every second, leave no trace.
    assert sum(span.name == "replica_handle_request Router __call__" for span in exported) == 4
    assert not [
        span.name
        for span in exported
        if span.name.endswith((" alive", " collect_metrics", " describe", " capabilities"))
    ]


def test_a_trace_endpoint_that_hangs_delays_nothing_and_is_logged_once(deployed, spans, cluster):
    service = deployed.service(traced=True)

    def all_warnings():
        """Returns the number of warnings of each deployment in all logs of this cluster."""
        return Counter(
            path.name.split("_")[2]
            for path in cluster.logs.glob("replica_parse_*.log")
            for line in path.read_text().splitlines()
            if line.startswith("{") and "does not accept spans" in json.loads(line)["message"]
        )

    earlier = all_warnings()

    def warnings():
        return all_warnings() - earlier

    async def send_requests():
        async def all_logged():  # the logs are flushed at intervals
            return warnings().keys() == {"Router", "Verifier", "Drafter"}

        started = time.monotonic()
        for problem in problems(4):
            await service.answer(chat(problem.question))
        # If requests waited for their spans, each of the four would wait for the time limit at least once.
        assert time.monotonic() - started < 4 * EXPORT_TIMEOUT_S
        await until(all_logged)
        await asyncio.gather(*(service.answer(chat(problem.question)) for problem in problems(8)))
        await asyncio.sleep(3 * EXPORT_TIMEOUT_S)  # several more attempts fail

    with spans.hanging():
        asyncio.run(send_requests())
        started = time.monotonic()
        deployed.clear()
        assert time.monotonic() - started < 30
    assert warnings() == {"Router": 1, "Verifier": 1, "Drafter": 1}
