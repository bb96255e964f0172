"""Answers one question in every mode.

A mode says how drafts are used, and each request can choose its own. `exact` and `off` give the answer of the target
alone. `full`, `rounds` and `progressive` may word it differently, because they accept a draft that the target verified
as correct. `auto` uses drafts while they save time.

    python examples/per_request_modes.py
"""

from parse import DEMO_DRAFT, DEMO_TARGET, EXAMPLE_PROMPT, Pair
from parse.registry import MODES


def main() -> None:
    with Pair(DEMO_TARGET, DEMO_DRAFT) as pair:
        print(f"{'mode':<12} {'accepted':>8} {'generated':>9} {'ms':>6}  last line of the answer")
        for mode in MODES:
            answer = pair.generate(EXAMPLE_PROMPT, mode=mode, temperature=0)
            usage, last_line = answer.usage, answer.text.splitlines()[-1]
            counts = f"{usage.accepted_tokens:>8} {usage.target_tokens:>9} {usage.total_s * 1e3:>6.0f}"
            print(f"{mode:<12} {counts}  {last_line}")


if __name__ == "__main__":
    main()
