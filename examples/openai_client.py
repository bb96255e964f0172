"""Streams an answer from a running service with the OpenAI client.

Start the service first, for example with `python -m deployments`. You also need the package `openai`.

    python examples/openai_client.py --url http://127.0.0.1:8000
"""

import argparse
from collections.abc import Sequence

from openai import OpenAI

QUESTION = (
    "Dan has 48 coins. In turn: first gets 7, second finds 3, third lends 6, fourth loses 3, fifth wins 8, "
    "sixth finds 2, seventh breaks 2. How many coins now?"
)


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
