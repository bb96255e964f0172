"""Adds an acceptance rule: how many prefixes of a draft are kept.

The built-in rule `first_failure` keeps the prefixes before the first one below the threshold. The rule in this example
tolerates a single prefix below the threshold, if the next prefix passes again. It therefore keeps more of a draft, but
also accepts more errors.

    python examples/custom_acceptance_rule.py
"""

from collections.abc import Sequence

from parse import (
    DEMO_DRAFT,
    DEMO_TARGET,
    EXAMPLE_PROMPT,
    Pair,
    RuleSpec,
    VerificationSettings,
    register_rule,
)


def tolerate_one_failure(p_correct: Sequence[float | None], threshold: float) -> int:
    """Returns the number of prefixes to keep.

    `p_correct` has one value per prefix, from the shortest to the longest. A value is None if the prefix was not
    evaluated, for example because it does not fit into the context.
    """
    passes = [value is not None and value >= threshold for value in p_correct]
    num_kept = 0
    for index, passed in enumerate(passes):
        if passed:
            num_kept = index + 1
        elif not any(passes[index + 1 : index + 2]):  # two failures in a row, or a failure at the end
            break
    return num_kept


def main() -> None:
    register_rule("tolerate_one_failure", RuleSpec("keeps what precedes two failures in a row", tolerate_one_failure))
    for rule in ("first_failure", "tolerate_one_failure"):
        # The demo target gives correct prefixes a P(correct) near 1. The rules differ only if a correct prefix fails.
        # The threshold is therefore extremely high here. All prefixes are evaluated, because a search for the first
        # failure can miss one that is followed by a longer prefix that passes.
        verification = VerificationSettings.for_model(DEMO_TARGET, rule=rule, prefix=0.9988, stride=4, exhaustive=True)
        with Pair(DEMO_TARGET, DEMO_DRAFT, verification=verification) as pair:
            answer = pair.generate(EXAMPLE_PROMPT, mode="full", temperature=0)
        values = " ".join("-" if value is None else f"{value:.4f}" for value in answer.verifications[0].p_correct)
        print(f"{rule}: {answer.usage.accepted_tokens} of {answer.usage.draft_tokens} draft tokens accepted")
        print(f"P(correct) of the prefixes: {values}\n")


if __name__ == "__main__":
    main()
