"""The names of the package `parse`, and what importing them costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import parse
from parse.options import SAMPLING_FIELDS, GenerateOptions

SOURCE = ast.parse(Path(parse.__file__).read_text())


def test_every_public_name_is_what_type_checkers_see():
    (guarded,) = (node for node in SOURCE.body if isinstance(node, ast.If))
    imports = {
        alias.name: statement.module
        for statement in guarded.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert sorted(imports) == sorted(parse.__all__)
    assert imports == {name: module for module, names in parse._MODULES.items() for name in names}
    for name, module in imports.items():
        assert getattr(parse, name) is getattr(sys.modules[str(module)], name)
    assert set(parse.__all__) <= set(dir(parse))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'parse' has no attribute 'Pare'"):
        parse.Pare  # noqa: B018


@pytest.mark.parametrize("statement", ["import parse.config", "from parse import EngineSettings, RequestError"])
def test_importing_settings_does_not_import_torch(statement):
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules or 'parse.pair' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_options_of_a_call_contain_every_sampling_parameter():
    others = {"thresholds", "prediction", "prompt_logprobs", "speculative_method", "sampling_params"}
    others |= {"chat_template_kwargs"}
    assert set(GenerateOptions.__annotations__) == {*SAMPLING_FIELDS, *others}
