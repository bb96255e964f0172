"""Rules and methods from outside the package: how they are registered, and where they take effect."""

from typing import Any

import pytest
from pydantic import ValidationError

from parse.acceptance import AcceptancePolicy, Thresholds, accepted_prefix_length, next_batch, passes
from parse.config import EngineSettings, SpeculativeConfig, VerificationSettings
from parse.errors import RequestError, VerificationError
from parse.registry import METHODS, RULES, MethodSpec, RuleSpec, register_method, register_rule
from parse.requests import GenerationRequest
from tests.registrations import temporary_registrations

HALF = Thresholds(0.5, 0.5)
INVALID: Any = 7


def keep_before_two_failures(p_correct, threshold):
    """Keeps the prefixes before two failures in a row."""
    for index in range(len(p_correct) - 1):
        if not passes(p_correct[index], threshold) and not passes(p_correct[index + 1], threshold):
            return index
    return len(p_correct)


@pytest.fixture(autouse=True)
def _registrations_end_with_the_test():
    with temporary_registrations():
        yield


def test_a_registered_rule_decides_which_prefix_is_accepted():
    p_correct = [0.9, 0.1, 0.9, 0.1, 0.1, 0.9]
    lengths = [4, 8, 12, 16, 20, 24]
    register_rule("two_failures", RuleSpec("keeps what precedes two failures", keep_before_two_failures))
    policy = AcceptancePolicy(HALF, "two_failures")
    assert accepted_prefix_length(lengths, p_correct, policy, complete=False) == 12
    assert accepted_prefix_length(lengths, p_correct, AcceptancePolicy(HALF), complete=False) == 4


def test_the_complete_answer_is_left_to_its_own_threshold():
    register_rule("everything", RuleSpec("keeps everything", lambda p_correct, threshold: len(p_correct)))
    policy = AcceptancePolicy(HALF, "everything")
    assert accepted_prefix_length([4, 8], [0.1, 0.1], policy, complete=True) == 4
    assert accepted_prefix_length([4, 8], [0.1, 0.5], policy, complete=True) == 8
    assert accepted_prefix_length([], [], policy, complete=True) == 0


def test_all_prefixes_are_evaluated_unless_a_rule_stops_at_the_first_failure():
    register_rule("patient", RuleSpec("", keep_before_two_failures))
    register_rule("strict", RuleSpec("", keep_before_two_failures, stops_at_failure=True))
    batches = {
        name: next_batch(4, {0: 0.1}, AcceptancePolicy(HALF, name), complete=False, max_batch=8, answer_first=False)
        for name in ("patient", "strict")
    }
    assert batches == {"patient": [1, 2, 3], "strict": []}


@pytest.mark.parametrize("num_kept", [-1, 3, None, 1.0])
def test_a_rule_that_keeps_more_prefixes_than_there_are_is_an_error(num_kept):
    register_rule("broken", RuleSpec("", lambda p_correct, threshold: num_kept))
    with pytest.raises(VerificationError, match=f"the rule broken kept {num_kept} of 2 prefixes"):
        accepted_prefix_length([4, 8], [0.9, 0.9], AcceptancePolicy(HALF, "broken"), complete=False)


def test_a_rule_that_is_not_registered_is_rejected():
    with pytest.raises(RequestError, match="rule: must be one of first_failure, longest_passing"):
        AcceptancePolicy(rule="two_failures")
    with pytest.raises(ValidationError, match="'first_failure' or 'longest_passing'"):
        VerificationSettings(rule="two_failures")
    register_rule("two_failures", RuleSpec("", keep_before_two_failures))
    assert VerificationSettings(rule="two_failures").rule == "two_failures"


def test_settings_and_requests_accept_a_method_as_soon_as_it_is_registered():
    with pytest.raises(ValidationError):
        SpeculativeConfig(method="phrases")
    with pytest.raises(RequestError):
        GenerationRequest((1,), speculative_method="phrases")
    register_method("phrases", MethodSpec("known phrases", "json:loads", model="required"))
    assert SpeculativeConfig(method="phrases", model="m").method == "phrases"
    assert GenerationRequest((1,), speculative_method="phrases").speculative_method == "phrases"
    with pytest.raises(ValidationError, match="phrases needs a model"):
        SpeculativeConfig(method="phrases")
    schema = EngineSettings.model_json_schema()["$defs"]["SpeculativeConfig"]
    assert schema["properties"]["method"]["enum"] == list(METHODS) and "phrases" in METHODS


def test_names_of_the_project_cannot_be_replaced_but_own_ones_can():
    with pytest.raises(ValueError, match="'first_failure' is a name of this project"):
        register_rule("first_failure", RuleSpec("", keep_before_two_failures))
    for name in ("ngram", "none"):
        with pytest.raises(ValueError, match=f"'{name}' is a name of this project"):
            register_method(name, MethodSpec("", "json:loads", model="none"))
    for description in ("old", "new"):
        register_rule("mine", RuleSpec(description, keep_before_two_failures))
    assert RULES["mine"].description == "new"


def test_a_rule_is_not_called_without_prefixes():
    register_rule("never_empty", RuleSpec("fails without prefixes", lambda p_correct, _: int(p_correct[0] == 1)))
    assert accepted_prefix_length([4], [0.1], AcceptancePolicy(HALF, "never_empty"), complete=True) == 0


@pytest.mark.parametrize(
    ("register", "name", "spec", "message"),
    [
        (register_rule, "mine", keep_before_two_failures, "spec: must be a RuleSpec"),
        (register_rule, "mine", RuleSpec("", "parse.acceptance"), "function: must be a function or its path"),
        (register_rule, "mine", RuleSpec("", INVALID), "function: must be a function or its path"),
        (register_rule, None, RuleSpec("", keep_before_two_failures), "name: must consist of"),
        (register_method, "mine", RuleSpec("", "json:loads"), "spec: must be a MethodSpec"),
        (register_method, "mine", MethodSpec("", "json", model="none"), "loader: must be a function or its path"),
        (register_method, "mine", MethodSpec("", "json:loads", model=INVALID), "model: must be one of required"),
    ],
)
def test_an_invalid_registration_is_reported_by_name(register, name, spec, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        register(name, spec)
    assert "mine" not in RULES and "mine" not in METHODS


@pytest.mark.parametrize("name", ["", "Two", "two failures", "2nd"])
def test_a_name_has_to_fit_into_metrics_and_urls(name):
    with pytest.raises(ValueError, match="lower-case letters, digits and underscores"):
        register_rule(name, RuleSpec("", keep_before_two_failures))
