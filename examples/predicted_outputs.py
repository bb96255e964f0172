"""Uses an answer that you already have as the draft. No draft model is needed.

This is useful if you can predict most of an answer: a document after a small edit, the answer to an earlier version of
a question, or the output of another system.

Mode `exact` accepts a prediction as long as the target would generate the same tokens, so the answer is the target's
own. Mode `full` accepts what the target verifies as correct, even if it would word it differently. It keeps more, but
the target may overlook an error, in particular an error that its draft model never makes.

    python examples/predicted_outputs.py
"""

from parse import DEMO_TARGET, EXAMPLE_PROMPT, Pair


def main() -> None:
    with Pair(DEMO_TARGET) as pair:
        answer = pair.generate(EXAMPLE_PROMPT, mode="off", temperature=0)
        print(f"without a prediction: {answer.usage.target_tokens} tokens generated\n")

        # The same question, except that the last two players score more. The answer changes from there on.
        edited_prompt = EXAMPLE_PROMPT.replace("Ben 80", "Ben 85").replace("Sam 26", "Sam 91")
        edited = pair.generate(edited_prompt, mode="exact", temperature=0, prediction=answer.text)
        print(edited)
        usage = edited.usage
        print(f"\nwith a prediction: {usage.accepted_tokens} tokens accepted, {usage.target_tokens} generated")


if __name__ == "__main__":
    main()
