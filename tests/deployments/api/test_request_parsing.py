import pytest

from deployments.api.request_parsing import offered_modes
from deployments.config import ApiSettings
from parse.engines.protocol import Capabilities


def engine_with(*modes: str) -> Capabilities:
    return Capabilities(modes, (), frozenset(), max_logprobs=0, max_model_len=100, block_size=16)


def test_a_configured_mode_that_the_engine_lacks_is_rejected_at_startup():
    with pytest.raises(ValueError, match=r"api\.modes: the engine does not support rounds"):
        offered_modes(ApiSettings(modes=("full", "rounds")), engine_with("full", "off"))


def test_by_default_the_modes_of_the_engine_are_offered():
    assert offered_modes(ApiSettings(), engine_with("full", "off")) == ("auto", "full", "off")
    assert offered_modes(ApiSettings(modes=("off",)), engine_with("full", "off")) == ("off",)
