"""Checks the arguments of `vllm serve` with vLLM's own code.

    python argument_check.py (all | syntax) ARGUMENTS...

It runs in the environment of vLLM, and imports nothing of the project. The last line of the standard error says what is
wrong. With `all`, the model and the machine are taken into account too, as at the start of the server.
"""

import sys
from collections.abc import Sequence

EXIT_BAD_ARGUMENTS = 2


def main(scope: str, arguments: Sequence[str]) -> None:
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # older releases
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    namespace = make_arg_parser(FlexibleArgumentParser(prog="vllm serve", allow_abbrev=False)).parse_args(arguments)
    if scope == "syntax" or current_platform.is_unspecified():
        return
    try:
        AsyncEngineArgs.from_cli_args(namespace).create_engine_config()
    except Exception as error:
        errors = getattr(error, "errors", None)  # of Pydantic, whose messages have many lines
        message = (
            "; ".join(str(each["msg"]).removeprefix("Value error, ") for each in errors()) if errors else str(error)
        )
        print(" ".join(message.split()), file=sys.stderr)
        sys.exit(EXIT_BAD_ARGUMENTS)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
