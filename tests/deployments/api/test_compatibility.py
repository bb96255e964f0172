"""What clients take for granted beside the two endpoints."""

import json
from importlib.metadata import version
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import torch
from fastapi import FastAPI
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from deployments.api import handlers
from deployments.api.routes import create_app
from deployments.config import ApiSettings
from parse.demo import DEMO_TARGET
from tests.deployments.api.test_routes import BODY, CHAT, COMPLETIONS, HELLO, error_of, post, serving
from tests.deployments.conftest import MODEL
from tests.deployments.live import PATIENCE_S, LocalBackend, Writer, served
from training.measure import draw_problems


def preflight(address: str, origin: str, **headers: str) -> httpx.Response:
    request_headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    return httpx.options(f"{address}{CHAT}", headers=request_headers | headers)


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/ready", "/metrics", "/"])
def test_head_has_the_headers_of_get_and_no_body(raw, path):
    head, get = raw.head(path), raw.get(path)
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_a_slash_at_the_end_of_a_path_changes_nothing(raw):
    assert raw.get("/v1/models/").json() == raw.get("/v1/models").json()
    assert raw.get(f"/v1/models/{MODEL}/").json()["id"] == MODEL
    assert raw.post(f"{CHAT}/", json=BODY).status_code == 200
    assert raw.get("/v1//").status_code == 404


def test_paths_below_a_prefix_are_served_with_and_without_a_slash(pair):
    application = FastAPI()
    application.mount("/p", create_app(LocalBackend(pair.pipeline), ApiSettings(), MODEL))
    with served(application) as address:
        for path in ("/p/", "/p/v1/models", "/p/v1/models/"):
            assert httpx.get(address + path).status_code == 200
        assert httpx.get(f"{address}/p", follow_redirects=True).status_code == 200


def test_a_preflight_is_no_request_in_the_metrics(pair):
    settings = ApiSettings(cors_origins=("https://chat.example",))
    with served(create_app(LocalBackend(pair.pipeline), settings, MODEL)) as address:
        assert preflight(address, "https://chat.example").status_code == 200
        lines = httpx.get(f"{address}/metrics").text.splitlines()
    counters = [line for line in lines if line.startswith(("parse_requests_total{", "parse_cancellations_total{"))]
    assert counters and all(line.endswith(" 0.0") for line in counters)


@pytest.mark.parametrize("origin", ["https://chat.example/", "chat.example", "https://a.example/x", "null"])
def test_an_origin_that_never_matches_is_rejected(origin):
    with pytest.raises(ValidationError, match="must be like"):
        ApiSettings(cors_origins=(origin,))


def test_the_version_is_that_of_the_package(raw):
    assert raw.get("/version").json() == {"version": version("parse-serve")}


def test_the_model_card_has_what_benchmarks_read(raw):
    (card,) = raw.get("/v1/models").json()["data"]
    assert card["root"] == MODEL and card["max_model_len"] > 0 and card["parent"] is None


def test_text_and_chats_are_tokenized_as_for_an_answer(raw, pair):
    tokenizer = pair.tokenizer
    text = raw.post("/tokenize", json={"model": MODEL, "prompt": "Ann leads.", "return_token_strs": True}).json()
    assert text["tokens"] == tokenizer.encode("Ann leads.", add_special_tokens=False)
    assert text["token_strs"] == tokenizer.convert_ids_to_tokens(text["tokens"])
    assert (text["count"], text["max_model_len"]) == (len(text["tokens"]), pair.pipeline.capabilities.max_model_len)
    chat = raw.post("/tokenize", json={"messages": HELLO}).json()
    assert chat["token_strs"] is None
    assert chat["count"] == raw.post(CHAT, json=BODY).json()["usage"]["prompt_tokens"]
    assert raw.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"] == tokenizer.apply_chat_template(
        HELLO, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "tokens": [1]}, "tokens"),
        ("/detokenize", {"tokens": [510]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"prompt": "a"}, "prompt"),
    ],
)
def test_what_cannot_be_tokenized_is_named(raw, path, body, param):
    assert error_of(raw.post(path, json=body), 400)["param"] == param


def test_tokenizing_for_another_model_is_rejected(raw):
    error_of(raw.post("/tokenize", json={"model": "other", "prompt": "a"}), 404)


def test_a_context_overflow_has_the_wording_that_clients_recognize(raw, pair):
    limit = pair.pipeline.capabilities.max_model_len
    for path, body in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "Hello"})):
        error = error_of(raw.post(path, json={"model": MODEL, "max_tokens": limit, **body}), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith(f"This model's maximum context length is {limit} tokens. However, you ")


def test_scripts_of_configured_origins_may_use_the_api(pair, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret")
    origin, other = "https://chat.example", "https://other.example"
    with serving(pair, api_keys_file=str(keys), cors_origins=(origin,)) as address:
        allowed = preflight(address, origin, **{"Access-Control-Request-Headers": "authorization,content-type"})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == origin
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        assert preflight(address, other).status_code == 400
        response = post(address, Authorization="Bearer secret", Origin=origin)
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == origin
        assert "x-request-id" in response.headers["access-control-expose-headers"]
        error = post(address, Origin=origin)  # a script can read why it is rejected
        assert error.status_code == 401 and error.headers["access-control-allow-origin"] == origin
        assert "access-control-allow-origin" not in post(address, Authorization="Bearer secret", Origin=other).headers
    with serving(pair) as address:
        assert "access-control-allow-origin" not in preflight(address, origin).headers


def test_unknown_fields_are_ignored_and_listed_if_the_operator_allows_it(pair):
    body: dict[str, Any] = BODY | {"guidance": 1, "a,\u00e9": 2, "messages": [HELLO[0] | {"weight": 1}]}
    with serving(pair, ignore_unknown_fields=True) as address:
        for stream in (False, True):
            response = post(address, body | {"stream": stream})
            assert response.status_code == 200
            assert set(response.headers["x-ignored-fields"].split(", ")) == {"guidance", "a??", "weight"}
        assert "x-ignored-fields" not in post(address).headers
        assert error_of(post(address, body | {"n": 0}), 400)["param"] == "n"
        assert error_of(post(address, BODY | {"audio": {}}), 400)["param"] == "audio"  # a field of the API
    with serving(pair) as address:
        assert error_of(post(address, body), 400)["param"] == "guidance"


def test_a_long_request_id_is_rejected_and_others_are_returned(raw):
    assert raw.post(CHAT, json=BODY, headers={"x-request-id": "x" * 512}).status_code == 200
    assert error_of(raw.post(CHAT, json=BODY, headers={"x-request-id": "x" * 513}), 400)["param"] == "x-request-id"


def test_responses_say_how_many_more_requests_are_accepted(pair):
    with serving(pair, max_answers=3, max_queued_requests=4) as address:
        for body in (BODY, BODY | {"stream": True}):
            headers = post(address, body).headers
            assert headers["x-ratelimit-limit-requests"] == "7"
            assert 6 <= int(headers["x-ratelimit-remaining-requests"]) <= 7
            assert headers["x-ratelimit-reset-requests"].endswith("s")


def test_a_silent_stream_is_kept_alive_with_comments(pair, monkeypatch):
    monkeypatch.setattr(handlers, "KEEP_ALIVE_INTERVAL_S", 0.05)
    writer = Writer([300])  # it waits after the first token
    with serving(pair, writer) as address:
        lines = []
        with httpx.stream("POST", f"{address}{CHAT}", json=BODY | {"stream": True}, timeout=PATIENCE_S) as response:
            for line in response.iter_lines():
                lines.append(line)
                if lines.count(": keep-alive") == 3:
                    writer.may_go_on.set()
        assert lines.count(": keep-alive") >= 3 and lines[-2] == "data: [DONE]"
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stream_begins_before_a_late_first_token(pair, monkeypatch):
    monkeypatch.setattr(handlers, "KEEP_ALIVE_INTERVAL_S", 0.05)
    writer = Writer()
    with (
        serving(pair, writer) as address,
        httpx.stream("POST", f"{address}{CHAT}", json=BODY | {"stream": True}, timeout=PATIENCE_S) as response,
    ):
        assert response.status_code == 200  # before there is any text
        writer.may_go_on.set()
        assert "data: [DONE]" in list(response.iter_lines())


@pytest.mark.parametrize("with_key", [False, True])
def test_the_document_requires_a_key_only_if_the_server_does(pair, tmp_path, with_key):
    keys = tmp_path / "keys"
    keys.write_text("secret")
    with serving(pair, **({"api_keys_file": str(keys)} if with_key else {})) as address:
        operations = [
            operation
            for path in httpx.get(f"{address}/openapi.json").json()["paths"].values()
            for operation in path.values()
            if "security" in operation
        ]
    assert len(operations) >= 7
    assert all(({} in operation["security"]) != with_key for operation in operations)


# Log-probabilities of prompts.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_an_echo_contains_the_prompt_and_its_log_probabilities(raw, pair, stream, max_tokens, as_tokens):
    messages = [{"role": "user", "content": draw_problems(31, 1)[0].question}]
    ids = raw.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = pair.tokenizer.decode(ids)
    body = {"model": MODEL, "prompt": ids if as_tokens else text, "max_tokens": max_tokens, "temperature": 0}
    body |= {"echo": True, "logprobs": 2, "stream": stream}
    response = raw.post(COMPLETIONS, json=body)
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        parts = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
        logprobs = {name: [value for part in parts for value in part[name]] for name in parts[0]}
        got = "".join(choice["text"] for event in events for choice in event["choices"])
        finish = events[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        logprobs, got, finish = choice["logprobs"], choice["text"], choice["finish_reason"]
        usage = response.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), max_tokens)
    assert got.startswith(text) and (got == text) == (not max_tokens) and finish == "length"
    assert "".join(logprobs["tokens"]) == got
    assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:at])) for at in range(len(ids) + max_tokens)]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    network = AutoModelForCausalLM.from_pretrained(DEMO_TARGET).eval()
    with torch.inference_mode():
        expected = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    for position in range(1, len(ids)):
        row = expected[position - 1]
        assert logprobs["token_logprobs"][position] == pytest.approx(float(row[ids[position]]), abs=1e-3)
        assert max(logprobs["top_logprobs"][position].values()) == pytest.approx(float(row.max()), abs=1e-3)


def test_an_echo_without_log_probabilities_is_the_prompt_and_the_answer(raw):
    body = {"model": MODEL, "prompt": ["Ann leads.", "Ben"], "max_tokens": 2, "temperature": 0, "n": 2}
    plain = [choice["text"] for choice in raw.post(COMPLETIONS, json=body).json()["choices"]]
    echoed = raw.post(COMPLETIONS, json=body | {"echo": True}).json()["choices"]
    prompts = ["Ann leads.", "Ann leads.", "Ben", "Ben"]
    assert [choice["text"] for choice in echoed] == [a + b for a, b in zip(prompts, plain, strict=True)]
    assert {choice["logprobs"] for choice in echoed} == {None}


def test_nothing_is_generated_for_a_limit_of_zero_tokens(raw):
    response = raw.post(COMPLETIONS, json={"model": MODEL, "prompt": "a", "max_tokens": 0}).json()
    assert response["choices"][0]["text"] == "" and response["usage"]["completion_tokens"] == 0
    assert error_of(raw.post(CHAT, json=BODY | {"max_tokens": 0}), 400)["param"] == "max_tokens"


# The end of the prompt and of the answer.


def test_an_answer_can_continue_the_last_message(raw):
    messages: list[dict[str, Any]] = [{"role": "user", "content": draw_problems(31, 1)[0].question}]
    body = {"model": MODEL, "temperature": 0, "messages": messages}
    for mode in ("off", "exact"):
        answer = raw.post(CHAT, json=body | {"parse": {"mode": "off"}}).json()["choices"][0]["message"]["content"]
        beginning = answer[: len(answer) // 2].rsplit(" ", 1)[0]
        started = {"messages": [*messages, {"role": "assistant", "content": beginning}]}
        ending = {"add_generation_prompt": False, "continue_final_message": True, "parse": {"mode": mode}}
        response = raw.post(CHAT, json=body | started | ending).json()
        rest = response["choices"][0]["message"]["content"]
        assert beginning + rest == answer
        tokenized = raw.post("/tokenize", json=started | {name: ending[name] for name in list(ending)[:2]}).json()
        assert tokenized["count"] == response["usage"]["prompt_tokens"]
    error = error_of(raw.post(CHAT, json=body | {"continue_final_message": True}), 400)
    assert error["param"] == "continue_final_message"


def test_a_prompt_can_end_with_the_last_message(raw, pair):
    tokens = raw.post("/tokenize", json={"messages": HELLO, "add_generation_prompt": False}).json()["tokens"]
    text = pair.tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=False)
    assert tokens == pair.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("mode", ["off", "full", "exact", "progressive"])
def test_an_answer_has_a_minimum_length_and_ends_at_stop_tokens(raw, pair, mode):
    body: dict[str, Any] = {
        "model": MODEL,
        "temperature": 0,
        "messages": [{"role": "user", "content": draw_problems(31, 1)[0].question}],
        "parse": {"mode": mode},
    }
    plain = raw.post(CHAT, json=body).json()
    text, count = plain["choices"][0]["message"]["content"], plain["usage"]["completion_tokens"]
    longer = raw.post(CHAT, json=body | {"min_tokens": count + 6, "max_tokens": count + 9}).json()
    assert count + 6 <= longer["usage"]["completion_tokens"] <= count + 9
    ids = pair.tokenizer.encode(text, add_special_tokens=False)
    stop = ids[len(ids) // 2]
    end = ids.index(stop)
    for include in (False, True):
        fields = {"stop_token_ids": [stop], "include_stop_str_in_output": include}
        response = raw.post(CHAT, json=body | fields).json()["choices"][0]
        assert response["finish_reason"] == "stop"
        assert response["message"]["content"] == pair.tokenizer.decode(ids[: end + include])


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/nothing/%F0%9F%A6%8A", "/" + "x" * 5000])
def test_an_unknown_address_is_named(raw, path):
    error = error_of(raw.post(path, json={"input": "Hello."}), 404)
    assert error["code"] == "unknown_url"
    assert f"Invalid URL (POST {unquote(path)[:100]})" in error["message"]
