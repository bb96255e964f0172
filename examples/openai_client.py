"""Streams an answer from a running service with the OpenAI client.

Start the service first, for example with `python -m deployments`. The client is a package of its own: `pip install openai`.

    python examples/openai_client.py --url http://127.0.0.1:8000
"""

import argparse
from collections.abc import Sequence

from openai import OpenAI

QUESTION = "Start with 53. In turn: subtract 5, add 8, add 6, subtract 9. What is the result?"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Streams an answer from a running service.")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the service")
    parser.add_argument("--mode", default="auto", help="how drafts are used")
    args = parser.parse_args(arguments)

    # A service without bearer keys accepts any key from this machine.
    with OpenAI(base_url=f"{args.url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": args.question}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"parse": {"mode": args.mode}},  # the options of this project
        )
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
            if chunk.usage is not None:
                print(f"\n{chunk.usage.completion_tokens} tokens")


if __name__ == "__main__":
    main()
