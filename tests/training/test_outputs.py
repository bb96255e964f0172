import asyncio
import json
from itertools import islice

import pytest

from parse.demo import DEMO_DRAFT, DEMO_TARGET
from training import outputs
from training.outputs import (
    TargetOutput,
    demo_prompts,
    generate_outputs,
    read_outputs,
    read_prompts,
    start_target,
    write_outputs,
)
from training.task import correct_answer, draw_problem
from training.wording import DRAFT, TARGET


@pytest.fixture(scope="module")
def engine():
    opened = start_target(DEMO_TARGET, None, 1024)
    yield opened
    opened.shutdown()


def test_every_other_pair_of_prompts_continues_a_prefix_of_a_draft(tokenizer):
    begun = list(islice(demo_prompts(DEMO_TARGET, tokenizer, 3), 8))
    assert [bool(start) for _, start in begun] == [False, False, True, True] * 2
    for index in (2, 3, 6, 7):
        problem = draw_problem(outputs.SPLIT, 3, index)
        assert problem.question in tokenizer.decode(begun[index][0])
        assert correct_answer(problem, DRAFT).startswith(tokenizer.decode(begun[index][1]))
    assert begun == list(islice(demo_prompts(DEMO_TARGET, tokenizer, 3), 8))


def test_for_the_draft_model_a_prefix_ends_with_a_correction_by_the_target(tokenizer):
    begun = list(islice(demo_prompts(DEMO_DRAFT, tokenizer, 3), 40))
    assert [bool(start) for _, start in begun] == [False, False, True, True] * 10
    num_drafted_lines = []
    for index in (index for index, (_, start) in enumerate(begun) if start):
        problem = draw_problem(outputs.SPLIT, 3, index)
        start = tokenizer.decode(begun[index][1])
        drafted, corrected = (correct_answer(problem, wording).splitlines(True) for wording in (DRAFT, TARGET))
        lines = next(n for n in range(len(drafted)) if not start.startswith("".join(drafted[: n + 1])))
        num_drafted_lines.append(lines)
        correction = start.removeprefix("".join(drafted[:lines]))
        assert correction and "".join(corrected[lines:]).startswith(correction)
        assert len(tokenizer.encode(correction, add_special_tokens=False)) <= outputs.CORRECTION_TOKENS
    assert len(set(num_drafted_lines)) > 3


def test_the_target_continues_and_ends(engine, tokenizer):
    begun = list(islice(demo_prompts(DEMO_TARGET, tokenizer, 3), 4))
    short = asyncio.run(generate_outputs(engine, begun, 5))
    for (prompt, start), output in zip(begun, short, strict=True):
        assert output.prompt == prompt
        assert output.output[: len(start)] == start
        assert output.begun == len(start)
        assert len(output.output) == len(start) + 5 or output.output[-1] == tokenizer.eos_token_id
    (complete,) = asyncio.run(generate_outputs(engine, begun[:1], 240))
    assert complete.output[-1] == tokenizer.eos_token_id
    assert complete.output[:5] == short[0].output


def test_an_interrupted_run_continues_after_the_last_complete_line(engine, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "MAX_NUM_SEQS", 2)
    complete, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    write_outputs(engine, demo_prompts(DEMO_TARGET, tokenizer, 1), 5, complete, max_tokens=4)
    lines = complete.read_text().splitlines(keepends=True)
    torn.write_text("".join(lines[:2]) + lines[2][:20])
    assert len(read_outputs(torn)) == 2
    write_outputs(engine, demo_prompts(DEMO_TARGET, tokenizer, 1), 5, torn, max_tokens=4)
    assert torn.read_text() == complete.read_text()
    assert len(read_outputs(complete)) == 5


def test_prompts_are_texts_or_messages(tokenizer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "How many?"}]
    path.write_text(json.dumps({"prompt": "How many?"}) + "\n" + json.dumps({"messages": messages}) + "\n")
    one, other = read_prompts(path, tokenizer)
    assert one == other
    assert one[1] == []
    for line in ("{}", '{"messages": [{"role": "nobody", "content": ""}]}', "nonsense", '"text"'):
        path.write_text(json.dumps({"prompt": "How many?"}) + "\n" + line + "\n")
        with pytest.raises(ValueError, match="line 2: not a prompt"):
            list(read_prompts(path, tokenizer))


def test_an_invalid_line_is_named(tmp_path):
    path = tmp_path / "outputs.jsonl"
    path.write_text(json.dumps({"prompt": [1], "output": [2], "begun": 0}) + '\n{"prompt": [1]}\n')
    with pytest.raises(ValueError, match="line 2: not an output"):
        read_outputs(path)
    path.write_text(json.dumps({"prompt": [1], "output": [2], "begun": 0}) + "\n")
    assert read_outputs(path) == [TargetOutput([1], [2], 0)]
