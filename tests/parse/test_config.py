"""A key that is not known is rejected with its location, and with the key to write instead."""

import json
import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from deployments.config import ApiSettings, AppSettings
from parse.config import VERIFICATION_FILE, EngineSettings, SpeculativeConfig, VerificationSettings
from parse.engine_config import RemoteEngineConfig
from parse.errors import RequestError
from parse.pair_settings import PairSettings, engine_settings
from parse.registry import METHODS, MODES
from parse.renamed_settings import RENAMED_SETTINGS, describe_errors
from parse.settings import Settings

SECTIONS = {
    model.section: model
    for model in (AppSettings, EngineSettings, SpeculativeConfig, VerificationSettings, ApiSettings)
}


class Application(Settings):
    """A minimal `deployments.config.AppSettings`."""

    section = "args"

    target: EngineSettings
    verification: VerificationSettings = VerificationSettings()


def error(**data: object) -> str:
    with pytest.raises(ValidationError) as rejected:
        Application.model_validate(data)
    return describe_errors(rejected.value)


def test_a_renamed_key_is_rejected_with_its_new_name_and_unit():
    assert error(target={"model": "m", "memory_mb": 512}) == (
        "target.memory_mb was renamed to target.kv_cache_memory_bytes; multiply by 1048576 (MiB to bytes)"
    )
    assert error(target={"model": "m"}, verification={"places": ["lines"]}) == (
        "verification.places was renamed to verification.prefix_boundaries"
    )


def test_a_renamed_key_in_a_list_is_located():
    configs = [{"method": "ngram"}, {"method": "eagle3", "head": "h"}]
    assert error(target={"model": "m", "speculative_configs": configs}) == (
        "target.speculative_configs[1].head was renamed to target.speculative_configs[1].model"
    )


def test_all_renamed_keys_are_told_at_once_those_inside_a_renamed_section_among_them():
    configs = [{"method": "ngram", "tokens": 3, "xxx": 1}]
    message = error(target={"model": "m", "threads": 1, "speculation": configs}, method={"auto": "full", "strid": 1})
    assert sorted(message.split("; ")) == sorted(
        [
            "target.threads was renamed to target.num_threads",
            "target.speculation was renamed to target.speculative_configs",
            "target.speculation[0].tokens was renamed to target.speculative_configs[0].num_speculative_tokens",
            "target.speculation[0].xxx is not known",
            "the keys here are method, model, num_speculative_tokens, topk",
            "method was renamed to verification",
            "method.auto was renamed to verification.auto_mode",
            "method.strid is not known",
            "did you mean stride?",
        ]
    )


def test_a_misspelled_key_is_rejected_with_the_closest_one():
    assert error(target={"model": "m", "max_model_length": 1}) == (
        "target.max_model_length is not known; did you mean max_model_len?"
    )
    assert error(targt={"model": "m"}) == "target: Field required; targt is not known; did you mean target?"
    assert "xyz is not known; the keys here are target, verification" in error(target={"model": "m"}, xyz=1)


def test_other_errors_stay_as_they_are():
    message = error(
        target={"model": "m", "memory_mb": 1, "max_num_seqs": 0}, verification={"full": 2, "auto_mode": "off"}
    )
    assert "target.max_num_seqs: Input should be greater than or equal to 1" in message
    assert "verification.full: Input should be less than or equal to 1" in message
    assert "verification.auto_mode: Input should be 'full', 'progressive', 'rounds' or 'exact'" in message
    configs = [{"method": "eagle3"}, {"method": "ngram", "head": "h"}]
    assert "target.speculative_configs[0]: Value error, eagle3 needs a model" in error(
        target={"model": "m", "speculative_configs": configs}
    )


def test_pydantics_own_message_names_the_new_key_too():
    """It is all that `serve deploy` shows."""
    with pytest.raises(
        ValidationError, match=r"target.memory_mb was renamed to target.kv_cache_memory_bytes; multiply"
    ):
        Application.model_validate({"target": {"model": "m", "memory_mb": 512}})


def test_the_file_beside_a_model_is_checked_alike(tmp_path):
    for content, message in (
        ({"check_question": "Right?"}, "check_question was renamed to prompt"),
        ({"fool": 0.5}, "fool is not known; did you mean full?"),
    ):
        (tmp_path / VERIFICATION_FILE).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"was renamed|is not known") as rejected:
            VerificationSettings.for_model(str(tmp_path))
        assert str(rejected.value) == f"{tmp_path / VERIFICATION_FILE}: {message}"


def test_the_table_names_keys_that_exist_and_none_that_still_do():
    for renamed in RENAMED_SETTINGS:
        keys = SECTIONS[renamed.section].model_fields
        assert renamed.new_name in keys and renamed.old_name not in keys


def test_schemas_show_the_choices_of_the_registry():
    schema = EngineSettings.model_json_schema()
    assert schema["$defs"]["SpeculativeConfig"]["properties"]["method"]["enum"] == list(METHODS)
    modes = VerificationSettings.model_json_schema()["properties"]["auto_mode"]["anyOf"][0]["enum"]
    assert set(modes) == set(MODES) - {"auto", "off"}


def test_the_settings_of_a_model_in_the_hubs_cache_are_used(tmp_path):
    """A model on the hub can have a parse.json as a folder can. The cache is built here, and the hub is not asked."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "tokenizer_config.json").write_text("{}")
    code = "from parse.config import VerificationSettings as V; print(V.for_model('some/model', stride=3))"

    def settings():
        environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert "prompt='Is it so?'" not in settings()
    (snapshot / "parse.json").write_text('{"prompt": "Is it so?"}')
    assert "prompt='Is it so?'" in settings() and "stride=3" in settings()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "remote", "urll": "http://a"}, "target.engine.remote.urll is not known; did you mean url?"),
        ({"kind": "remote"}, "target.engine.remote: Value error, needs either url or deployment; neither is set"),
        ({"kind": "remote", "url": "http://a", "deployment": "llm/m"}, "needs either url or deployment; not both"),
        ({"kind": "remote", "deployment": "m"}, "must be the names of an application and its deployment"),
        ({"kind": "remote", "deployment": "/m"}, "must be the names of an application and its deployment"),
        ({"kind": "remote", "deployment": ""}, "must be the names of an application and its deployment"),
        (
            {"kind": "remote", "deployment": "llm/m", "api_key_env": "KEY", "tls_ca_file": "ca.pem"},
            "api_key_env, tls_ca_file: calls to a deployment do not use this",
        ),
        (
            {"kind": "remote", "deployment": "llm/m", "connect_timeout_s": 5.0},
            "connect_timeout_s: calls to a deployment do not use this",
        ),
        ({"kind": "remote", "url": "a:8000"}, "must begin with http:// or https://"),
        ({"kind": "remote", "url": "http://"}, "must begin with http:// or https:// and name a host"),
        ({"kind": "remote", "url": "http://a:99999"}, "Port out of range"),
        ({"kind": "remote", "url": "http://user@a"}, "must not contain a query, a fragment or a user"),
        ({"kind": "remote", "url": ["http://a", "http://a/"]}, "must name each server only once"),
        ({"kind": "remote", "url": []}, "must name at least one server"),
        ({"kind": "sglang"}, "'native', 'vllm', 'remote'"),
        ({"kind": "native", "url": "http://a"}, "target.engine.native.url is not known"),
    ],
)
def test_what_is_wrong_with_the_settings_of_an_engine_is_named(engine, message):
    with pytest.raises(ValidationError) as error:
        AppSettings.model_validate({"target": {"model": "m", "engine": engine}})
    assert message in describe_errors(error.value)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (
            {"drafting": {"check": "unsure", "confidence": 1.01}},
            "draft.drafting.confidence: Input should be less than or equal to 1",
        ),
        (
            {"drafting": {"check": "unsure", "confidence": -0.1}},
            "draft.drafting.confidence: Input should be greater than or equal to 0",
        ),
        ({"drafting": {"confidence": 0.9}}, "confidence is used only with check \"unsure\", got 'always'"),
        ({"drafting": {"check": "maybe"}}, "draft.drafting.check: Input should be 'always', 'unsure' or 'never'"),
        (
            {"drafting": {"check": "unsure"}},
            "'unsure' needs one of eagle3, parallel as the first of speculative_configs",
        ),
        (
            {"drafting": {"check": "never"}, "speculative_configs": [{"method": "ngram"}]},
            "'never' needs one of eagle3, parallel as the first of speculative_configs",
        ),
        (
            {
                "drafting": {"check": "never"},
                "speculative_configs": [{"method": "parallel", "model": "head", "topk": 2}],
            },
            "'never' needs a chain, so topk must be 1",
        ),
        (
            {"drafting": {"check": "never"}, "engine": {"kind": "remote", "url": "http://a"}},
            "drafting: a remote engine does not use this",
        ),
    ],
)
def test_what_is_wrong_with_unchecked_drafting_is_named(draft, message):
    with pytest.raises(ValidationError) as error:
        AppSettings.model_validate({"target": {"model": "m"}, "draft": {"model": "d", **draft}})
    assert message in describe_errors(error.value)


def test_a_target_does_not_draft():
    target = {"model": "m", "drafting": {"check": "always"}}
    for settings in (AppSettings, PairSettings):
        with pytest.raises(ValidationError, match="only the draft model has this setting"):
            settings.model_validate({"target": target})
    with pytest.raises(RequestError, match="target: drafting: only the draft model has this setting"):
        engine_settings("target", EngineSettings.model_validate(target))


@pytest.mark.parametrize(
    ("deployment", "path"),
    [("llm/LLMServer:qwen3-32b", ("llm", "LLMServer:qwen3-32b")), ("team/llm/LLMServer", ("team/llm", "LLMServer"))],
)
def test_a_deployment_is_named_with_its_application(deployment, path):
    engine = RemoteEngineConfig(kind="remote", deployment=deployment, stall_timeout_s=9.0, model_name="m")
    assert engine.deployment_path == path and engine.urls == ()


@pytest.mark.parametrize("setting", [{"num_threads": 1}, {"device": "cpu"}, {"speculative_configs": []}])
def test_settings_that_a_remote_engine_would_ignore_are_rejected(setting):
    engine = {"kind": "remote", "url": "http://a"}
    with pytest.raises(ValidationError, match="a remote engine does not use this"):
        EngineSettings.model_validate({"model": "m", "engine": engine, **setting})
    EngineSettings.model_validate({"model": "m", "engine": engine, "max_model_len": 100, "max_num_seqs": 8})
