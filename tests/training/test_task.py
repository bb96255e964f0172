import itertools
import random
import re
import subprocess
import sys

import pytest

from training.mistakes import MISTAKE_KINDS, compose_answer
from training.task import (
    FAMILIES,
    GAINING,
    WORD,
    Problem,
    RecordProblem,
    TotalsProblem,
    UnrecognizedQuestion,
    check_answer,
    correct_answer,
    draw_problem,
    parse_question,
)
from training.wording import ENDINGS, LINES

SMALL: list[Problem] = [
    TotalsProblem("Max", "nuts", 20, (("loses", 3), ("finds", 8))),
    RecordProblem(("Zoe", 40), (("Ann", 37), ("Ben", 52))),
]
PROBLEMS = [draw_problem("test", 1, index) for index in range(90)]


def every_correct_answer(problem):
    """Returns every correct answer as one text. The checker must agree with this list."""
    lines, state = [], problem.start
    for number in range(problem.steps):
        slots, state = problem.step(number, state)
        lines.append([[alternative.format_map(slots) for alternative in part] for part in LINES[problem.family]])
    slots = problem.ending(state)
    lines.append([[alternative.format_map(slots) for alternative in part] for part in ENDINGS[problem.family]])
    return {"".join(words) for words in itertools.product(*itertools.chain(*lines))}


def final_answer(question):
    """Returns the result of an independent solution that reads only the words of the question."""
    numbers = [int(word) for word in re.findall(r"\d+", question)]
    if "How many" in question:
        total, *_ = numbers
        for verb, by in re.findall(r"\w+ (\w+) (\d+)[,.]", question.split("In turn:")[1]):
            total += int(by) if verb in GAINING else -int(by)
        return str(total)
    scores = re.findall(r"(?:with|first|second|third|\w+th) (\w+ )?(\d+)", question)
    return str(max(int(score) for _, score in scores))


def test_the_last_line_contains_the_result_of_an_independent_solution():
    for problem in PROBLEMS:
        assert final_answer(problem.question) in re.findall(r"\w+", correct_answer(problem).splitlines()[-1])


@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.family)
def test_the_checker_agrees_with_the_list_of_all_correct_answers(problem):
    rights = every_correct_answer(problem)
    rng = random.Random(0)
    for text in rng.sample(sorted(rights), 20):
        for _ in range(10):
            spoilt = list(text)
            for _ in range(rng.randint(0, 2)):
                spoilt[rng.randrange(len(spoilt))] = rng.choice("3 89,.\nBenAZoe")
            first_wrong = next(
                (k for k in range(len(spoilt)) if not any(r.startswith("".join(spoilt[: k + 1])) for r in rights)), None
            )
            result = check_answer(problem, spoilt)
            assert result.first_wrong == first_wrong
            assert result.complete == ("".join(spoilt) in rights)


def test_the_result_does_not_depend_on_how_an_answer_is_split():
    rng = random.Random(0)
    for problem in PROBLEMS[:30]:
        text = correct_answer(problem, 1).replace(" 4", " 5")
        by_character = check_answer(problem, list(text))
        parts, at = [], 0
        while at < len(text):
            parts.append(text[at : at + rng.randint(1, 20)])
            at += len(parts[-1])
        result = check_answer(problem, parts)
        assert (result.first_wrong is None) == (by_character.first_wrong is None)
        if result.first_wrong is not None and by_character.first_wrong is not None:
            assert len("".join(parts[: result.first_wrong])) <= by_character.first_wrong
            assert by_character.first_wrong < len("".join(parts[: result.first_wrong + 1]))


def test_every_wording_and_all_its_prefixes_are_correct():
    rng = random.Random(0)
    for problem in PROBLEMS:
        for voice in (lambda line, part: 0, lambda line, part: 1, lambda line, part: 2, lambda line, part: None):
            words = WORD.findall("".join(phrase.text for phrase in compose_answer(problem, rng, voice)))
            assert check_answer(problem, words) == (None, True)
            assert check_answer(problem, words[: rng.randrange(len(words))]) == (None, False)


def test_an_answer_that_continues_after_its_end_is_wrong_there():
    for problem in PROBLEMS:
        words = WORD.findall(correct_answer(problem))
        assert check_answer(problem, [*words, " So"]) == (len(words), False)


@pytest.mark.parametrize("kind", MISTAKE_KINDS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.family)
def test_mistakes_are_mistakes(kind, family):
    rng = random.Random(0)
    problems = [family.draw(rng) for _ in range(60)]
    answers = [
        "".join(p.text for p in compose_answer(problem, rng, lambda line, part: None, kind)) for problem in problems
    ]
    wrong = [
        not check_answer(problem, WORD.findall(text)).complete for problem, text in zip(problems, answers, strict=True)
    ]
    assert sum(wrong) >= 50  # sometimes another step has the same operation, and a 13th step has no 14th after it


def test_answers_are_60_to_200_tokens_long():
    for problem in (draw_problem("length", 0, index) for index in range(600)):
        for wording in (0, 1, 2):
            assert 60 <= len(WORD.findall(correct_answer(problem, wording))) <= 210 - 10 * (wording < 2)


def test_the_wordings_of_both_models_share_few_words_except_names_and_numbers():
    for problem in PROBLEMS:
        ours, theirs = (
            {w.strip() for w in WORD.findall(correct_answer(problem, k)) if w.strip().isalpha()} for k in (0, 1)
        )
        slots = set(WORD.findall(problem.question))
        shared = {w for w in ours & theirs if f" {w}" not in slots and w not in slots}
        assert shared <= {"to", "from"}


def test_alternatives_of_a_part_differ_in_their_first_word():
    for part in itertools.chain(*LINES.values(), *ENDINGS.values()):
        firsts = [
            WORD.findall(alternative)[0] if not alternative.startswith((" {", "{")) else alternative.split("}")[0]
            for alternative in part
        ]
        assert len(set(firsts)) == len(part)


def test_problems_depend_only_on_split_seed_and_index():
    drawn = {(s, k): [draw_problem(s, k, i).question for i in range(30)] for s in ("a", "b") for k in (1, 2)}
    assert drawn["a", 1] == [draw_problem("a", 1, i).question for i in range(30)]
    assert len(set(itertools.chain(*drawn.values()))) == 120


def test_a_question_is_parsed_into_its_problem():
    for problem in PROBLEMS:
        assert parse_question(problem.question) == problem


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is the capital of France?",
        "Max has 20 nuts. In turn: . How many nuts now?",
        "Max has 20 nuts. In turn: first eats 3. How many shells now?",
        "Max has 20 nuts. In turn: second loses 3. How many nuts now?",
        "Zoe has the record with forty. In turn: first Ann 37. Who has the record now?",
    ],
)
def test_other_questions_are_rejected(text):
    with pytest.raises(UnrecognizedQuestion, match="not a question of this task"):
        parse_question(text)


def run_cli(*args):
    return subprocess.run([sys.executable, "-m", "training.task", *args], capture_output=True, text=True)


def test_the_command_line_checks_an_answer():
    question, right = SMALL[0].question, correct_answer(SMALL[0])
    assert run_cli("--question", question, "--answer", right).stdout == "correct\n"
    assert run_cli("--question", question, "--answer", right[:30]).stdout.startswith("correct so far")
    assert "' 18'" in run_cli("--question", question, "--answer", right.replace("17", "18", 1)).stdout


def test_the_command_line_rejects_other_texts():
    done = run_cli("--question", "Why?", "--answer", "Because.")
    assert done.returncode != 0
    assert done.stderr == "not a question of this task: 'Why?'\n"
    done = run_cli("--question", SMALL[0].question, "--answer", "Bananas are blue.")
    assert done.returncode != 0
    assert "'Bananas'" in done.stderr
