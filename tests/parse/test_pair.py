"""The library: both models of the demo pair in this process, and the command line."""

import asyncio
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from parse.__main__ import main
from parse.config import VERIFICATION_FILE, EngineSettings, VerificationSettings
from parse.demo import DEMO_DRAFT, DEMO_MODELS, DEMO_TARGET, EXAMPLE_PROMPT
from parse.engines.drafter import RetokenizingDrafter, SharedVocabularyDrafter
from parse.events import Finished, TextDelta
from parse.pair import Pair
from parse.prompts import chat_prompt_token_ids
from parse.requests import GenerationRequest
from parse.types import SamplingParams
from training import measure
from training.examples import ExampleBuilder
from training.tokenizer import VERIFICATION_PROMPT
from training.wording import TARGET

GREEDY = SamplingParams(temperature=0.0, max_tokens=240)
PROBLEMS = measure.draw_problems(3, 12, split="local")


def settings(path):
    return EngineSettings(model=str(path), num_threads=1, max_model_len=1024, kv_cache_memory_bytes=512 * 2**20)


@pytest.fixture(scope="module")
def pair():
    with Pair(settings(DEMO_TARGET), settings(DEMO_DRAFT)) as pair:
        yield pair


def messages_of(problem):
    return [{"role": "user", "content": problem.question}]


def answered(pair, problem, mode, params=GREEDY, **fields):
    async def collect():
        request = GenerationRequest(
            chat_prompt_token_ids(pair.tokenizer, messages_of(problem)), messages_of(problem), params, mode, **fields
        )
        return [event async for event in pair.pipeline.generate(request)]

    events = asyncio.run(collect())
    deltas = [event for event in events if isinstance(event, TextDelta)]
    ids = [token for delta in deltas for token in delta.token_ids]
    assert "".join(delta.text for delta in deltas) == pair.tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(events[-1], Finished)
    return ids, events[-1]


def test_the_target_alone_generates_what_transformers_generates(pair):
    peer = AutoModelForCausalLM.from_pretrained(DEMO_TARGET).eval()
    for problem in PROBLEMS[:4]:
        prompt = torch.tensor([chat_prompt_token_ids(pair.tokenizer, messages_of(problem))])
        expected = peer.generate(prompt, do_sample=False, max_new_tokens=240)[0, prompt.shape[1] :].tolist()
        ids, finished = answered(pair, problem, "off")
        assert [*ids, pair.tokenizer.eos_token_id] == expected and finished.finish_reason == "stop"


@pytest.mark.parametrize("mode", ["full", "rounds", "progressive"])
def test_drafts_are_accepted_and_the_answers_are_correct(pair, mode):
    writer = ExampleBuilder(pair.tokenizer, own=TARGET)
    right = accepted = draft_tokens = 0
    for problem in PROBLEMS:
        ids, finished = answered(pair, problem, mode)
        right += finished.finish_reason == "stop" and measure.is_correct(writer, problem, [*ids, writer.eos_token_id])
        accepted, draft_tokens = accepted + finished.usage.accepted_tokens, draft_tokens + finished.usage.draft_tokens
        assert len(ids) == finished.usage.accepted_tokens + finished.usage.target_tokens
    assert right >= len(PROBLEMS) - 1
    assert accepted > draft_tokens / 2


def test_mode_exact_gives_the_answer_of_the_target_alone(pair):
    for seed, problem in enumerate(PROBLEMS[:5]):
        assert answered(pair, problem, "exact")[0] == answered(pair, problem, "off")[0]
        sampled = SamplingParams(temperature=1.0, seed=seed, max_tokens=60)
        assert answered(pair, problem, "exact", sampled)[0] == answered(pair, problem, "off", sampled)[0]


def test_a_correct_prediction_is_accepted_in_full(pair):
    own, _ = answered(pair, PROBLEMS[0], "off")
    for mode in ("full", "progressive", "rounds", "exact"):
        ids, finished = answered(pair, PROBLEMS[0], mode, prediction=own)
        assert ids == own and finished.usage.accepted_tokens == len(own) and finished.usage.target_tokens == 0


def test_log_probabilities_are_those_of_the_target_for_tokens_of_both_models(pair):
    request = GenerationRequest(
        chat_prompt_token_ids(pair.tokenizer, messages_of(PROBLEMS[0])),
        sampling_params=SamplingParams(temperature=0.0, logprobs=2),
    )

    async def collect():
        return [e async for e in pair.pipeline.generate(request) if isinstance(e, TextDelta)]

    deltas = asyncio.run(collect())
    ids = [token for delta in deltas for token in delta.token_ids]
    logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
    peer = AutoModelForCausalLM.from_pretrained(DEMO_TARGET).eval()
    with torch.inference_mode():
        logits = peer(input_ids=torch.tensor([[*request.prompt_token_ids, *ids]])).logits[
            0, len(request.prompt_token_ids) - 1 : -1
        ]
    expected = logits.log_softmax(-1)
    assert len(logprobs) == len(ids) and all(len(logprob.top) == 2 for logprob in logprobs)
    for row, token, logprob in zip(expected, ids, logprobs, strict=True):
        assert logprob.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert logprob.top[0][1] == pytest.approx(float(row.max()), abs=1e-3)


def test_a_drafter_with_another_tokenizer_drafts_the_same_text(pair, foreign_draft):
    with Pair(settings(DEMO_TARGET), settings(foreign_draft)) as other:
        assert isinstance(pair.pipeline.drafter, SharedVocabularyDrafter) and isinstance(
            other.pipeline.drafter, RetokenizingDrafter
        )
        accepted = 0
        for problem in PROBLEMS[:4]:
            for mode in ("full", "rounds"):
                ours, theirs = answered(pair, problem, mode), answered(other, problem, mode)
                assert ours[0] == theirs[0]
                accepted += theirs[1].usage.accepted_tokens
        assert accepted > 100


def test_the_demo_target_gets_the_verification_prompt_of_its_training():
    assert VerificationSettings.for_model(DEMO_TARGET).prompt == VERIFICATION_PROMPT


def test_arguments_take_precedence_over_the_settings_in_the_folder_of_a_model(tmp_path):
    (tmp_path / VERIFICATION_FILE).write_text('{"full": 0.5, "prefix": 0.4}')
    settings = VerificationSettings.for_model(str(tmp_path), prefix=0.6)
    assert (settings.full, settings.prefix) == (0.5, 0.6)
    assert VerificationSettings.for_model("no/such-model") == VerificationSettings()
    for broken in ("{", "[1]", '{"fool": 0.5}'):
        (tmp_path / VERIFICATION_FILE).write_text(broken)
        with pytest.raises(ValueError, match=str(tmp_path / VERIFICATION_FILE)):
            VerificationSettings.for_model(str(tmp_path))


def test_the_command_prints_the_answer_and_the_usage(capsys):
    main([EXAMPLE_PROMPT, "--mode", "full"])
    answer, summary = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    assert "Ben" in answer.splitlines()[-1] and "80" in answer.splitlines()[-1]
    assert re.match(
        r"mode full; accepted \d+ of \d+ draft tokens in 1 round\(s\); the target generated \d+; draft", summary
    )


def test_the_command_generates_several_tokens_in_a_pass_with_a_speculative_method(capsys):
    answers = []
    for how in ([], ["--speculation", "parallel", "--head", str(DEMO_MODELS / "demo-parallel")]):
        main([EXAMPLE_PROMPT, "--mode", "off", *how])
        answer, summary = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
        answers.append(answer)
    assert answers[0] == answers[1]
    match = re.match(r"mode off; the target generated (\d+) in (\d+) passes by parallel; draft", summary)
    assert match and int(match[1]) > 2 * int(match[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "question: must not be empty"),
        ([EXAMPLE_PROMPT, "--max-tokens", "-1"], "max_tokens: must be at least 0"),
        ([EXAMPLE_PROMPT, "--temperature", "9"], "temperature: must be at least 0.0 and at most 2.0"),
        ([EXAMPLE_PROMPT, "--target", "/nowhere"], "target: /nowhere is not a folder"),
        ([EXAMPLE_PROMPT * 200], "prompt: is"),
        ([EXAMPLE_PROMPT, "--speculation", "eagle3"], "speculation: Value error, eagle3 needs a model"),
        ([EXAMPLE_PROMPT, "--head", "models/demo-eagle3"], "speculation: Input should be 'draft_model'"),
    ],
)
def test_the_command_reports_invalid_input_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parse", *arguments])
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert message in str(ended.value) and "\n" not in str(ended.value)
