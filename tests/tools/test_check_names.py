"""The check of names: what it finds, what it lets pass, and that its list is well formed."""

from pathlib import Path

import pytest

from tools.check_names import MAX_CLASS_LINES, MAX_MODULE_LINES, check, read_list, split_name

LIST = """
[[word]]
words = ["wish", "so_far"]
use = "proposal_request"
allow = [
    { files = ["parse/wells.py"], names = ["wish_*"], reason = "a well" },
    { kinds = ["keyword"], names = ["wish"], reason = "an argument of a library" },
]

[[word]]
words = ["rows"]
match = "name"
use = "sequences"
files = ["parse/*"]

[[word]]
words = ["verdict"]
use = "verification"
in_test_sentences = true

[[word]]
words = ["Done"]
match = "class"
use = "Finished"

[[shared_class]]
name = "Drafter"
files = ["parse/protocol.py", "deployments/drafter.py"]
"""


@pytest.fixture
def name_list(tmp_path):
    file = tmp_path / "names.toml"
    file.write_text(LIST)
    return read_list(file)


def lines_of(problems: list[str]) -> list[int]:
    return [int(problem.split(":")[1]) for problem in problems]


def test_names_are_split_into_words():
    assert split_name("KVCache") == ["kv", "cache"]
    assert split_name("_max_model_len") == ["max", "model", "len"]
    assert split_name("EagleHead3Config") == ["eagle", "head", "3", "config"]


@pytest.mark.parametrize(
    "code",
    [
        "wish = 1",
        "WISH: int = 1",
        "class ModelWish: pass",
        "def wish_for(): pass",
        "async def a_wish(): pass",
        "def f(*, wish): pass",
        "lambda wish: 1",
        "x.wish = 1",
        "print(x.wish)",
        "f(wish_list=1)",
        "import x as wish",
        "for _wish in (): pass",
        "[0 for wish in ()]",
        "(wish := 1)",
        "with f() as wish: pass",
        "try: pass\nexcept E as wish: pass",
        "match x:\n    case [wish, *_]: pass",
        "match x:\n    case [*wish]: pass",
        "match x:\n    case {**wish}: pass",
        "so_far = 1",
        "length_so_far = 1",
        "class SoFar: pass",
    ],
)
def test_a_word_is_found_wherever_a_name_is_defined_or_used(name_list, code):
    assert len(check({"parse/a.py": code}, name_list)) == 1


@pytest.mark.parametrize(
    "code", ["wishes = 1", "far_so = 1", "'wish'", "print(wish)", "args.wish", "f(wish=1)", "done = 1", "num_rows = 1"]
)
def test_other_names_pass(name_list, code):
    assert check({"parse/a.py": code}, name_list) == []


def test_a_violation_names_its_place_and_the_better_name(name_list):
    (problem,) = check({"parse/a.py": "x = 1\n\n\nwish = 1"}, name_list)
    assert problem.startswith("parse/a.py:4: wish: ")
    assert "proposal_request" in problem


def test_the_name_of_a_module_is_checked(name_list):
    assert lines_of(check({"parse/wish.py": ""}, name_list)) == [1]
    assert check({"parse/__init__.py": ""}, name_list) == []


def test_a_word_may_be_forbidden_in_some_files_only(name_list):
    assert lines_of(check({"parse/a.py": "rows = 1", "bench/a.py": "rows = 1"}, name_list)) == [1]


def test_a_word_may_be_forbidden_as_the_name_of_a_class_only(name_list):
    assert lines_of(check({"parse/a.py": "done = 1\nclass Done: pass\nclass DoneTwice: pass"}, name_list)) == [2]


def test_names_of_tests_are_sentences_and_may_use_common_words(name_list):
    tests = "def test_a_wish_is_granted(): pass\n\ndef test_a_verdict_is_kept(): pass\n\ndef a_wish(): pass"
    assert lines_of(check({"tests/test_a.py": tests}, name_list)) == [3, 5]


def test_an_allowance_covers_its_files_and_names_only(name_list):
    code = "wish_count = 1\nwish = 1"
    assert lines_of(check({"parse/wells.py": code}, name_list)) == [2]
    assert lines_of(check({"parse/a.py": code}, name_list)) == [1, 2]


def test_an_allowance_that_nothing_needs_is_reported_if_everything_is_checked(name_list):
    sources = {"parse/a.py": "f(wish=1)"}
    assert check(sources, name_list) == []
    (problem,) = check(sources, name_list, report_unused=True)
    assert "a well" in problem


def test_long_modules_and_classes_are_reported_outside_tests(name_list):
    body = "    pass\n"
    fits = "class A:\n" + body * (MAX_CLASS_LINES - 1)
    code = fits + "class B:\n" + body * MAX_CLASS_LINES
    assert len(code.splitlines()) > MAX_MODULE_LINES
    assert lines_of(check({"parse/a.py": code}, name_list)) == [1, MAX_CLASS_LINES + 1]
    assert check({"parse/a.py": fits, "tests/a.py": code}, name_list) == []


def test_a_class_name_is_used_once_unless_its_files_may_share_it(name_list):
    (problem,) = check({"parse/a.py": "class A: pass", "bench/a.py": "class A: pass"}, name_list)
    assert "parse/a.py:1" in problem and "bench/a.py:1" in problem
    assert check({"parse/a.py": "class A: pass", "tests/a.py": "class A: pass"}, name_list) == []
    drafters = {"parse/protocol.py": "class Drafter: pass", "deployments/drafter.py": "class Drafter: pass"}
    assert check(drafters, name_list) == []
    assert len(check(drafters | {"bench/a.py": "class Drafter: pass"}, name_list)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('allow = [{ files = ["parse/*"] }]', "reason"),
        ('allow = [{ reason = "everywhere" }]', "files or names"),
        ("in_tests = true", "in_tests"),
    ],
)
def test_a_malformed_list_is_refused(tmp_path, line, message):
    file = tmp_path / "names.toml"
    file.write_text(f'[[word]]\nwords = ["wish"]\nuse = "request"\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_list(file)


def test_the_list_of_the_project_is_well_formed_and_names_each_word_once():
    words = read_list(Path("tools/names.toml")).words
    listed = [(word.word, word.match) for word in words]
    assert len(listed) == len(set(listed)) > 50
