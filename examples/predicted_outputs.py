"""Verifies an answer that you already have, instead of a draft of the draft model.

This is useful if you can predict most of an answer: a document after a small edit, the answer to an earlier version of
a question, or the output of another system. The target verifies the prediction, keeps its longest correct prefix, and
generates the rest. No draft model is needed.

    python examples/predicted_outputs.py
"""

from parse import DEMO_TARGET, EXAMPLE_PROMPT, Pair


def main() -> None:
    with Pair(DEMO_TARGET) as pair:
        answer = pair.generate(EXAMPLE_PROMPT, mode="off", temperature=0)
        print(f"without a prediction: {answer.usage.target_tokens} tokens generated\n")

        # The same question, except that the last two players score more.
        edited_prompt = EXAMPLE_PROMPT.replace("sixth Ben 80", "sixth Ben 85").replace(
            "seventh Sam 26", "seventh Sam 91"
        )
        edited = pair.generate(edited_prompt, mode="full", temperature=0, prediction=answer.text)
        print(edited)
        usage = edited.usage
        print(f"\nwith a prediction: {usage.accepted_tokens} tokens accepted, {usage.target_tokens} generated")


if __name__ == "__main__":
    main()
