"""Answers a question with any two models, and reports whether drafting helps.

The tokenizers of the models may differ: the draft is then converted to the tokens of the target. Both models need a
chat template.

    python examples/your_own_pair.py Qwen/Qwen3-4B Qwen/Qwen3-0.6B "What is 7 times 8?"
    python examples/your_own_pair.py /path/to/target /path/to/draft "What is 7 times 8?"

A target that was not trained to verify drafts works too, but its P(correct) is less reliable. Look at the printed
values before you rely on the default thresholds.
"""

import argparse
import sys
from collections.abc import Sequence

from parse import DEMO_DRAFT, DEMO_TARGET, EXAMPLE_PROMPT, ModelLoadError, Pair, RequestError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Answers a question with any two models.")
    parser.add_argument("target", nargs="?", default=DEMO_TARGET, help="folder or Hugging Face id of the target")
    parser.add_argument("draft", nargs="?", default=DEMO_DRAFT, help="folder or Hugging Face id of the draft model")
    parser.add_argument("question", nargs="?", default=EXAMPLE_PROMPT)
    parser.add_argument("--max-tokens", type=int, default=200, help="the maximum number of tokens of the answer")
    args = parser.parse_args(arguments)

    try:
        with Pair(args.target, args.draft) as pair:
            options = {"temperature": 0, "max_tokens": args.max_tokens}
            alone = pair.generate(args.question, mode="off", **options)
            drafted = pair.generate(args.question, mode="full", **options)
    except (ModelLoadError, RequestError) as error:
        sys.exit(f"your_own_pair.py: {error}")

    print(f"target alone, {alone.usage.total_s:.2f} s:\n{alone}\n")
    print(f"with a draft, {drafted.usage.total_s:.2f} s:\n{drafted}\n")
    for verification in drafted.verifications:
        for length, p_correct in zip(verification.prefix_lengths, verification.p_correct, strict=True):
            value = "not evaluated" if p_correct is None else f"{p_correct:.3f}"
            print(f"P(correct) of the first {length} draft tokens: {value}")
    print(f"{drafted.usage.accepted_tokens} of {drafted.usage.draft_tokens} draft tokens were accepted.")


if __name__ == "__main__":
    main()
