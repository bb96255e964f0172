"""Answers a question with two models, first as a whole and then as a stream.

python examples/library.py
"""

from parse import DEMO_DRAFT, DEMO_TARGET, EXAMPLE_PROMPT, Finished, Pair, TextDelta, Verification


def main() -> None:
    # Each model is a folder or a Hugging Face id. The demo pair is part of the installation.
    with Pair(DEMO_TARGET, DEMO_DRAFT) as pair:
        answer = pair.generate(EXAMPLE_PROMPT, mode="full", temperature=0)
        print(answer)
        print(f"{answer.usage.accepted_tokens} of {answer.usage.draft_tokens} draft tokens were accepted.\n")

        for event in pair.stream(EXAMPLE_PROMPT, mode="full", temperature=0):
            match event:
                case TextDelta(text=text, origin=origin):
                    print(f"[{origin}] {text}", flush=True)
                case Verification(rejected_text=text) if text:
                    print(f"[rejected] {text}", flush=True)
                case Finished(usage=usage):
                    print(f"The first text came after {usage.ttft_s:.2f} s, the last one after {usage.total_s:.2f} s.")


if __name__ == "__main__":
    main()
