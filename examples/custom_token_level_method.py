"""Adds a token-level method.

A method proposes several of the target's next tokens at once. The target computes all proposed tokens in one forward
pass and accepts them as long as it would choose the same ones. A method therefore changes the speed, but never the
text. The method in this example remembers all sequences since the start. It finds the last three tokens in them and
proposes the tokens that followed. It is useful if answers resemble each other.

    python examples/custom_token_level_method.py
"""

from collections.abc import Sequence

from torch import Tensor

from parse import DEMO_TARGET, EXAMPLE_PROMPT, EngineSettings, MethodSpec, Pair, SpeculativeConfig, register_method
from parse.speculative.proposal import MaskPrediction, Proposal, ProposalRequest, Proposer, chain_proposal
from parse.speculative.proposers.base import LoadContext, LoadedProposer

CONTEXT_LENGTH = 3  # tokens that have to be the same

Followers = dict[tuple[int, ...], int]


class AnswerMemory(Proposer["RememberedSequence"]):
    """Proposes the tokens that followed the last tokens in earlier sequences.

    All sequences share one memory.
    """

    def __init__(self) -> None:
        self.followers: Followers = {}

    def new_state(self) -> "RememberedSequence":
        return RememberedSequence(self.followers)

    def propose(self, requests: Sequence[ProposalRequest["RememberedSequence"]]) -> list[Proposal]:
        """Returns one proposal for each sequence, which may be empty."""
        return [request.state.continuation(min(request.max_tokens, request.max_depth)) for request in requests]

    def reset(self) -> None:
        self.followers.clear()


class RememberedSequence:
    """The state of one sequence.

    The engine passes it every new token, beginning with the whole prompt.
    """

    def __init__(self, followers: Followers) -> None:
        self.followers = followers
        self.token_ids: list[int] = []

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None, mask_prediction: MaskPrediction | None
    ) -> None:
        for token in tokens:
            if len(self.token_ids) >= CONTEXT_LENGTH:
                self.followers[tuple(self.token_ids[-CONTEXT_LENGTH:])] = token
            self.token_ids.append(token)

    def continuation(self, max_tokens: int) -> Proposal:
        token_ids = self.token_ids[-CONTEXT_LENGTH:]
        while len(token_ids) < CONTEXT_LENGTH + max_tokens:
            token = self.followers.get(tuple(token_ids[-CONTEXT_LENGTH:]))
            if token is None:
                break
            token_ids.append(token)
        return chain_proposal(token_ids[CONTEXT_LENGTH:])


def load(config: SpeculativeConfig, load_context: LoadContext) -> LoadedProposer:
    """Creates the method for one engine.

    `config.model` names its checkpoint if it needs one.
    """
    return LoadedProposer(AnswerMemory(), max_tokens=config.num_speculative_tokens or 8)


def main() -> None:
    register_method("answer_memory", MethodSpec("what followed the same tokens in earlier answers", load, model="none"))
    target = EngineSettings(model=DEMO_TARGET, speculative_configs=(SpeculativeConfig(method="answer_memory"),))
    with Pair(target) as pair:
        for method in ("none", "answer_memory", "answer_memory"):
            answer = pair.generate(EXAMPLE_PROMPT, mode="off", temperature=0, speculative_method=method)
            statistics = answer.usage.speculation
            passes = statistics.passes if statistics else answer.usage.target_tokens
            print(f"{method}: {answer.usage.target_tokens} tokens in {passes} passes")
        print(f"\n{answer}")


if __name__ == "__main__":
    main()
