"""How much of what a head proposes its target would have written: the figures of a head, and its card.

    python -m training.acceptance --head models/demo-eagle3 --problems 200

Greedy, on texts that the target wrote by itself: a proposal is followed as long as it says what stands there, and the
target adds one token. The first pass of an answer counts too, though it only ends the prompt.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from parse.speculative.proposal import Proposal, ProposalRequest, Proposer
from parse.speculative.proposers.eagle3 import Eagle3Proposer
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import ProposerLoadError, TargetModel
from parse.speculative.proposers.parallelspec import ParallelSpecProposer
from training.checkpoints import BrokenModel, load_model
from training.evaluate import MODELS, rounded
from training.outputs import AT_ONCE, Output, beginnings, open_target, read_outputs, written

PROOF = "speculation proof"  # problems that no head has seen


@dataclass(frozen=True)
class Acceptance:
    """Of a number of passes of the target."""

    passes: int
    tokens: int  # written in them
    accepted_at: tuple[float, ...]  # share of passes in which the first, second, ... proposed token was accepted
    proposed: float  # nodes of a proposal, on average
    propose_ms: float  # median, reading what is new included

    @property
    def length(self) -> float:
        """Tokens of a pass, the target's own one included."""
        return self.tokens / max(1, self.passes)


def followed(proposal: Proposal, text: Sequence[int]) -> int:
    """How far the tree goes along with the text."""
    at = -1
    for count, token in enumerate(text):
        here = (
            node for node, parent in enumerate(proposal.parents) if parent == at and proposal.token_ids[node] == token
        )
        at = next(here, -1)
        if at < 0:
            return count
    return len(text)


@torch.inference_mode()
def acceptance(method: Proposer[Any], network: PreTrainedModel, texts: Sequence[Output], most: int) -> Acceptance:
    lengths: list[int] = []
    seconds: list[float] = []
    passes = tokens = nodes = 0
    for text in texts:
        rows = torch.tensor([text.tokens], device=network.device)
        states = network(input_ids=rows, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        taps = method.aux_hidden_state_layers
        features = torch.cat([states[tap][0] for tap in taps], -1) if taps else None  # [T, taps * H]
        proposer, known, at = method.new_state(), 0, len(text.prompt) + text.begun
        while at < len(text.tokens):
            began = time.perf_counter()
            new_ones = None if features is None else features[max(0, known - 1) : at - 1]
            proposer.take(text.tokens[known:at], new_ones, None)
            (proposal,) = method.propose([ProposalRequest(proposer, most)])
            seconds.append(time.perf_counter() - began)
            lengths.append(followed(proposal, text.tokens[at:]))
            nodes += len(proposal.token_ids)
            known, at = at, min(at + lengths[-1] + 1, len(text.tokens))
            passes, tokens = passes + 1, tokens + at - known
    longest = max(lengths, default=0)
    shares = tuple(sum(length > k for length in lengths) / max(1, passes) for k in range(longest))
    median = statistics.median(seconds) if seconds else float("nan")
    return Acceptance(passes, tokens, shares, nodes / max(1, passes), median * 1e3)


def held_out(target: str, count: int, seed: int, threads: int | None = None) -> list[Output]:
    """Answers of the target to problems of the demo task, every other one going on from a draft's beginning."""
    service = open_target(target, threads, 1024)
    found: list[Output] = []
    try:
        begun = islice(beginnings(service.model.tokenizer, seed, PROOF), count)
        while group := list(islice(begun, AT_ONCE)):
            found += asyncio.run(written(service, group, 512))
    finally:
        service.shutdown()
    return found


@dataclass(frozen=True)
class Way:
    """How a head is asked."""

    most: int
    how: Mapping[str, int]  # of the method


def ways(parallel_tokens: int) -> dict[str, Way]:
    """Chains, and a tree of twice the size."""
    if parallel_tokens > 1:
        return {"chain": Way(parallel_tokens, {"beam": 1}), "tree": Way(2 * parallel_tokens, {"beam": 4})}
    return {
        "chain": Way(8, {"depth": 7, "beam": 1}),
        "long chain": Way(12, {"depth": 11, "beam": 1}),
        "tree": Way(16, {"depth": 7, "beam": 4}),
    }


def method_of(path: Path, network: PreTrainedModel, how: Mapping[str, int]) -> Eagle3Proposer | ParallelSpecProposer:
    head, embedding = load_head(path, TargetModel.of(network))
    return (ParallelSpecProposer if head.config.parallel_tokens > 1 else Eagle3Proposer)(head, embedding, **how)


def figures(path: Path, network: PreTrainedModel, texts: Sequence[Output]) -> dict[str, Any]:
    """Of a head in a folder, apart for plain answers and for those that others began."""
    kinds = by_kind(texts)
    head, _ = load_head(path, TargetModel.of(network))
    found: dict[str, Any] = {"texts": len(texts), "ways": {}}
    for name, way in ways(head.config.parallel_tokens).items():
        method = method_of(path, network, way.how)
        found["ways"][name] = {
            "most": way.most,
            **way.how,
            "of": {kind: told(acceptance(method, network, some, way.most)) for kind, some in kinds.items()},
        }
    return found


def by_kind(texts: Sequence[Output]) -> dict[str, list[Output]]:
    """Those that there are."""
    plain, continued = ([text for text in texts if bool(text.begun) == begun] for begun in (False, True))
    return {kind: some for kind, some in (("plain", plain), ("continued", continued)) if some}


def told(found: Acceptance) -> dict[str, Any]:
    return {
        "mean_accepted_length": found.length,
        "accepted_at": list(found.accepted_at),
        "passes": found.passes,
        "tokens": found.tokens,
        "proposed": found.proposed,
        "propose_ms": found.propose_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target", help="folder of the target")
    parser.add_argument("--head", type=Path, required=True, help="folder of the head")
    parser.add_argument("--outputs", type=Path, metavar="JSONL", help="what the target wrote; else of the demo task")
    parser.add_argument("--problems", type=int, default=200, help="of the demo task, none that training saw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads for arithmetic")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if args.outputs:
            texts = read_outputs(args.outputs)
        else:
            texts = held_out(str(args.target), args.problems, args.seed, args.threads)
        found = figures(args.head, load_model(args.target), texts)
    except (BrokenModel, ProposerLoadError, ValueError, OSError) as error:
        sys.exit(str(error))
    print(json.dumps(rounded(found), indent=2))


if __name__ == "__main__":
    main()
