"""Measures how many of a head's proposed tokens its target accepts, and writes the head's card.

    python -m training.acceptance --head models/demo-eagle3 --problems 200
    python -m training.acceptance --head models/demo-space --card

Decoding is greedy, on texts that the target generated itself. Proposed tokens are accepted as long as they equal the
text, and the target adds one token. The first pass of an answer also counts, although it only completes the prompt.
`--card` writes figures.json and README.md into the folder of the head.
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
from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.eagle3 import Eagle3Proposer
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import TargetModel
from parse.speculative.proposers.parallelspec import ParallelSpecProposer
from training.checkpoints import BrokenModel, load_model
from training.confidence import Interval, throughput_ratio_interval
from training.evaluate import MODELS, round_floats
from training.head_cards import is_space, read_figures, write_card
from training.outputs import MAX_NUM_SEQS, TargetOutput, demo_prompts, generate_outputs, read_outputs, start_target
from training.provenance import describe_run

HELD_OUT_SPLIT = "speculation proof"  # problems that no head has seen


@dataclass(frozen=True)
class AcceptanceStats:
    """The result of a number of passes of the target."""

    tokens_by_text: tuple[int, ...]  # tokens generated for each text
    passes_by_text: tuple[int, ...]
    acceptance_rates: tuple[float, ...]  # share of passes in which the first, second, ... proposed token was accepted
    mean_proposed: float  # nodes of a proposal, on average
    propose_ms: float  # median, including the time to read the new tokens

    @property
    def tokens(self) -> int:
        return sum(self.tokens_by_text)

    @property
    def passes(self) -> int:
        return sum(self.passes_by_text)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per pass, including the target's own token."""
        return self.tokens / max(1, self.passes)

    @property
    def interval(self) -> Interval | None:
        """The bootstrap interval of the tokens per pass, over texts."""
        ones = [1] * len(self.tokens_by_text)
        return throughput_ratio_interval(self.tokens_by_text, self.passes_by_text, ones, ones)


def count_accepted(proposal: Proposal, text: Sequence[int]) -> int:
    """Returns how many tokens of the text are on one path of the tree, from its root."""
    parent_node = -1
    for count, token in enumerate(text):
        children = (
            node
            for node, parent in enumerate(proposal.parents)
            if parent == parent_node and proposal.token_ids[node] == token
        )
        parent_node = next(children, -1)
        if parent_node < 0:
            return count
    return len(text)


@torch.inference_mode()
def measure_acceptance(
    method: Proposer[Any], network: PreTrainedModel, texts: Sequence[TargetOutput], max_tokens: int
) -> AcceptanceStats:
    lengths: list[int] = []
    seconds: list[float] = []
    tokens_by_text: list[int] = []
    passes_by_text: list[int] = []
    nodes = 0
    for text in texts:
        input_ids = torch.tensor([text.tokens], device=network.device)
        hidden_states = network(
            input_ids=input_ids, output_hidden_states=True, use_cache=False, logits_to_keep=1
        ).hidden_states
        layers = method.aux_hidden_state_layers
        features = (
            torch.cat([hidden_states[layer][0] for layer in layers], -1) if layers else None
        )  # [T, aux layers * H]
        proposer, num_read, position = method.new_state(), 0, len(text.prompt) + text.begun
        tokens_by_text.append(len(text.tokens) - position)
        passes_by_text.append(0)
        while position < len(text.tokens):
            started = time.perf_counter()
            new_features = None if features is None else features[max(0, num_read - 1) : position - 1]
            proposer.extend(text.tokens[num_read:position], new_features, None)
            (proposal,) = method.propose([ProposalRequest(proposer, max_tokens)])
            seconds.append(time.perf_counter() - started)
            lengths.append(count_accepted(proposal, text.tokens[position:]))
            nodes += len(proposal.token_ids)
            num_read, position = position, min(position + lengths[-1] + 1, len(text.tokens))
            passes_by_text[-1] += 1
    return AcceptanceStats(
        tuple(tokens_by_text),
        tuple(passes_by_text),
        acceptance_rates(lengths),
        nodes / max(1, len(lengths)),
        statistics.median(seconds) * 1e3 if seconds else float("nan"),
    )


def acceptance_rates(lengths: Sequence[int]) -> tuple[float, ...]:
    """Returns the share of passes that accepted at least 1, 2, ... tokens, from the accepted tokens of each pass."""
    return tuple(
        sum(length > position for length in lengths) / len(lengths) for position in range(max(lengths, default=0))
    )


def generate_held_out(target: str, count: int, seed: int, num_threads: int | None = None) -> list[TargetOutput]:
    """Returns answers of the target to problems of the demo task. Half of them continue the beginning of an answer."""
    engine = start_target(target, num_threads, 1024)
    outputs: list[TargetOutput] = []
    try:
        prompts = islice(demo_prompts(target, engine.model.tokenizer, seed, HELD_OUT_SPLIT), count)
        while group := list(islice(prompts, MAX_NUM_SEQS)):
            outputs += asyncio.run(generate_outputs(engine, group, 512))
    finally:
        engine.shutdown()
    return outputs


@dataclass(frozen=True)
class ProposalOptions:
    """How many tokens a head proposes, and with which options."""

    max_tokens: int
    method_options: Mapping[str, int]  # of the method


def proposal_options(parallel_tokens: int) -> dict[str, ProposalOptions]:
    """Returns the options to measure: chains, and a tree of twice the size."""
    if parallel_tokens > 1:
        return {
            "chain": ProposalOptions(parallel_tokens, {"beam": 1}),
            "tree": ProposalOptions(2 * parallel_tokens, {"beam": 4}),
        }
    return {
        "chain": ProposalOptions(8, {"depth": 7, "beam": 1}),
        "long chain": ProposalOptions(12, {"depth": 11, "beam": 1}),
        "tree": ProposalOptions(16, {"depth": 7, "beam": 4}),
    }


def load_method(
    path: Path, network: PreTrainedModel, method_options: Mapping[str, int]
) -> Eagle3Proposer | ParallelSpecProposer:
    head, embedding = load_head(path, TargetModel.of(network))
    topk, options = method_options["beam"], {name: value for name, value in method_options.items() if name != "beam"}
    return (ParallelSpecProposer if head.config.parallel_tokens > 1 else Eagle3Proposer)(
        head, embedding, topk=topk, **options
    )


def evaluate_head(path: Path, network: PreTrainedModel, texts: Sequence[TargetOutput]) -> dict[str, Any]:
    """Measures a head, separately for plain answers and for answers that continue a draft."""
    kinds = group_by_kind(texts)
    head, _ = load_head(path, TargetModel.of(network))
    metrics: dict[str, Any] = {"texts": len(texts), "ways": {}}
    for name, options in proposal_options(head.config.parallel_tokens).items():
        method = load_method(path, network, options.method_options)
        metrics["ways"][name] = {
            "most": options.max_tokens,
            **options.method_options,
            "of": {
                kind: acceptance_metrics(measure_acceptance(method, network, kind_texts, options.max_tokens))
                for kind, kind_texts in kinds.items()
            },
        }
    return metrics


def group_by_kind(texts: Sequence[TargetOutput]) -> dict[str, list[TargetOutput]]:
    """Returns the texts by kind, plain or continued. A kind without texts is left out."""
    plain, continued = (
        [text for text in texts if bool(text.begun) == continued_only] for continued_only in (False, True)
    )
    return {kind: kind_texts for kind, kind_texts in (("plain", plain), ("continued", continued)) if kind_texts}


def acceptance_metrics(stats: AcceptanceStats) -> dict[str, Any]:
    return {
        "mean_accepted_length": stats.mean_acceptance_length,
        "mean_accepted_length_interval": stats.interval,
        "accepted_at": list(stats.acceptance_rates),
        "passes": stats.passes,
        "tokens": stats.tokens,
        "proposed": stats.mean_proposed,
        "propose_ms": stats.propose_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target", help="folder of the target")
    parser.add_argument("--head", type=Path, required=True, help="folder of the head or of the adapters of SPACE")
    parser.add_argument(
        "--outputs", type=Path, metavar="JSONL", help="outputs of the target; the default is the demo task"
    )
    parser.add_argument("--problems", type=int, default=200, help="problems of the demo task that training never saw")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems")
    parser.add_argument("--card", action="store_true", help="write figures and card into the folder of the head")
    parser.add_argument("--threads", type=int, help="CPU threads for arithmetic")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    run = describe_run(problems=None if args.outputs else args.problems, seeds=[] if args.outputs else [args.seed])
    try:
        if args.outputs:
            texts = read_outputs(args.outputs)
        else:
            texts = generate_held_out(str(args.target), args.problems, args.seed, args.threads)
        metrics = {"run": run, **_evaluate(args.head, load_model(args.target), texts)}
        if args.card:
            write_card(args.head, {"trained": read_figures(args.head)["trained"], **metrics}, args.target.name)
    except (BrokenModel, ProposerLoadError, ValueError, OSError, KeyError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if not args.card:
        print(json.dumps(round_floats(metrics), indent=2))


def _evaluate(folder: Path, network: PreTrainedModel, texts: Sequence[TargetOutput]) -> dict[str, Any]:
    if is_space(folder):
        from training.space import evaluate_adapters  # it imports this module

        return evaluate_adapters(folder, network, texts)
    return evaluate_head(folder, network, texts)


if __name__ == "__main__":
    main()
