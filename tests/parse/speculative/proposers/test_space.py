"""Masks of SPACE: what the target predicts there, which tokens see them, and where they are put."""

import asyncio
import json
from contextlib import aclosing
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from parse.config import EngineSettings, SpeculativeConfig
from parse.demo import DEMO_MODELS, DEMO_TARGET
from parse.engines.native.attention import STEP_ATTENTION
from parse.engines.native.generation import TreeInput
from parse.engines.native.model import Model
from parse.engines.native.step_timing import measure_step_seconds
from parse.engines.native_loader import load_native_engine
from parse.requests import GenerateRequest
from parse.speculative.proposal import MaskPrediction, ProposalRequest
from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.space import MaskTokenEmbedder, SpaceProposer, SpaceState
from parse.speculative.proposers.space_adapters import (
    SpaceAdapters,
    SpaceAdaptersConfig,
    decoder_layers,
    load_adapters,
)
from parse.tree import MASK, tree_from_parents
from parse.types import SamplingParams, sum_stats
from tests.parse.engines.native.tiny import VOCABULARY, build, run_trees, serving
from training.head_checkpoints import save_adapters
from training.tokenizer import build_tokenizer

DENSE = ["llama", "qwen3", "gemma3_text", "gpt2", "opt"]
EXPERTS = ["mixtral", "deepseek_v3"]
TOKENS = torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def random_adapters(network, seed=3, masks=3):
    torch.manual_seed(seed)
    config = SpaceAdaptersConfig(32, len(decoder_layers(network)), rank=5, masks=masks)
    adapters = SpaceAdapters(config)
    with torch.no_grad():
        adapters.up.normal_()
        adapters.mask_embedding.normal_()
    return adapters.requires_grad_(False)


def model_with(kind, make_mask_embedder=None):
    network = build(kind)
    model = Model(network, build_tokenizer())
    model.mask_embedder = (
        random_adapters(network).attach(network) if make_mask_embedder is None else make_mask_embedder(network)
    )
    return model


@torch.inference_mode()
def logits_of_transformers(model, tokens):
    """The logits of a sequence with masks, in one pass of the library, without a cache."""
    network = model.network
    ids = torch.tensor([tokens])
    masks = (ids[0] == MASK).nonzero()[:, 0]
    embedded = network.get_input_embeddings()(ids.clamp(min=0))
    embedded[0, masks] = model.mask_embedder.embedding
    network.set_attn_implementation("sdpa" if network._supports_sdpa else "eager")
    try:
        with model.mask_embedder.at(masks):
            return network(inputs_embeds=embedded, use_cache=False).logits[0].float()
    finally:
        network.set_attn_implementation(STEP_ATTENTION)


TREE = [TOKENS[8], MASK, MASK, 5, 9, MASK, MASK, MASK, 7], [-1, 0, 1, 0, 3, 4, 5, 6, 4]
"""Tokens and parents: two masks after the first token; after its third token, three masks and a token."""


@pytest.mark.parametrize("kind", DENSE + EXPERTS)
def test_a_mask_sees_its_sequence_and_the_masks_before_it_and_only_later_masks_see_it(kind):
    model = model_with(kind)
    tree, positions = tree_from_parents(*TREE)
    with serving(model) as engine:
        (logits,) = run_trees(engine, TOKENS[:8], TreeInput(tree)).result()
    tokens, parents = TREE
    for node in range(len(tokens)):
        path = [node]
        while (parent := parents[path[0]]) >= 0:
            path.insert(0, parent)
        expected = logits_of_transformers(model, [*TOKENS[:8], *(tokens[k] for k in path)])[-1]
        torch.testing.assert_close(logits[positions[node]], expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", DENSE + EXPERTS)
def test_tokens_beside_masks_have_the_same_logits_bit_for_bit_whatever_the_adapters_are(kind):
    tree, positions = tree_from_parents(*TREE)
    logits = []
    for make_mask_embedder in (
        None,
        lambda network: random_adapters(network, seed=8).attach(network),
        lambda network: MaskTokenEmbedder(torch.zeros(32)),  # no adapters
    ):
        with serving(model_with(kind, make_mask_embedder)) as engine:
            logits.append(run_trees(engine, TOKENS[:8], TreeInput(tree)).result()[0])
    tokens = [positions[node] for node, token in enumerate(TREE[0]) if token != MASK]
    masks = [positions[node] for node, token in enumerate(TREE[0]) if token == MASK]
    for other in logits[1:]:
        if kind in DENSE:
            assert torch.equal(logits[0][tokens], other[tokens])
        else:  # the rounding of an expert depends on its number of tokens, and other masks go to other experts
            torch.testing.assert_close(logits[0][tokens], other[tokens], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logits[0][masks], other[masks])


def group_sizes(proposal):
    """The number of masks after each candidate, by its position; 0 stands for the end of the sequence."""
    sizes: dict[int, int] = {}
    depth: list[tuple[int, int]] = []  # of each node: candidates and masks on its path
    for token, parent in zip(proposal.token_ids, proposal.parents, strict=True):
        candidates, masks = depth[parent] if parent >= 0 else (0, 0)
        depth.append((candidates, masks + 1) if token == MASK else (candidates + 1, masks))
        if token == MASK:
            sizes[candidates] = max(sizes.get(candidates, 0), masks + 1)
    return sizes


PREDICTION = MaskPrediction((7, 8, 9), (0.9, 0.5, 0.5))


def candidates(proposal):
    return [token for token in proposal.token_ids if token != MASK]


def propose(prediction, max_tokens=200, min_probability=0.0, max_depth=99):
    proposer = SpaceProposer(MaskTokenEmbedder(torch.zeros(1)), 3)
    state = proposer.new_state()
    state.extend([1], None, prediction)
    (proposal,) = proposer.propose([ProposalRequest(state, max_tokens, min_probability, max_depth)])
    proposed_candidates = candidates(proposal)
    assert proposed_candidates == list(prediction.token_ids[: len(proposed_candidates)] if prediction else ())
    assert len(proposal.token_ids) <= max_tokens
    return proposal


def test_without_a_limit_a_group_follows_every_candidate_and_the_sequence():
    proposal = propose(PREDICTION)
    assert group_sizes(proposal) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert len(proposal.token_ids) == 3 + 4 * 3


def test_without_predictions_there_is_one_group():
    assert group_sizes(propose(None)) == {0: 3}


def test_groups_follow_the_candidates_where_acceptance_most_likely_ends():
    # The probabilities that it ends before the first candidate, after it, after the second, after the third: 0.1,
    # 0.45, 0.225, 0.225.
    assert group_sizes(propose(PREDICTION, min_probability=0.2)) == {1: 3, 2: 3, 3: 3}
    assert group_sizes(propose(PREDICTION, max_tokens=3 + 3)) == {1: 3}
    assert group_sizes(propose(PREDICTION, max_tokens=3 + 4)) == {1: 3, 2: 1}
    proposal = propose(PREDICTION, min_probability=0.3)  # the third has 0.225
    assert candidates(proposal) == [7, 8]
    assert group_sizes(proposal) == {1: 3, 2: 3}  # acceptance ends after the second with 0.45 now
    assert group_sizes(propose(PREDICTION, min_probability=0.95)) == {0: 3}


def test_there_are_no_more_candidates_than_requested():
    proposal = propose(PREDICTION, max_depth=2)
    assert candidates(proposal) == [7, 8] and group_sizes(proposal) == {0: 3, 1: 3, 2: 3}


def test_the_probability_of_a_candidate_includes_those_before_it():
    proposal = propose(PREDICTION)
    assert proposal.probabilities[:3] == pytest.approx([0.9, 0.45, 0.225])


# Loading.


def save_random_adapters(tmp_path, **changes):
    network = build("llama")
    adapters = random_adapters(network)
    save_adapters(adapters, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    return network, adapters


def test_saved_adapters_load_again(tmp_path):
    network, adapters = save_random_adapters(tmp_path)
    loaded = load_adapters(tmp_path, network)
    assert loaded.config == adapters.config
    for name, parameter in adapters.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, and the target's is 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, and the target's is 2"),
        ({"rank": 6}, r"down must have the shape \(2, 6, 32\) for this target, got \(2, 5, 32\)"),
        ({"masks": 0}, "must be at least 1, and masks at most 256, got rank 5 and 0 masks"),
        ({"masks": 1000}, "got rank 5 and 1000 masks"),
        ({"rank": -3}, "got rank -3"),
        ({"rank": "many"}, "is damaged"),
    ],
)
def test_adapters_that_do_not_fit_are_rejected_with_both_sizes(tmp_path, changes, message):
    network, _ = save_random_adapters(tmp_path, **changes)
    with pytest.raises(ProposerLoadError, match=message):
        load_adapters(tmp_path, network)


def test_values_that_are_not_finite_are_rejected(tmp_path):
    network, adapters = save_random_adapters(tmp_path)
    with torch.no_grad():
        adapters.up[1, 2, 3] = torch.nan
    save_adapters(adapters, tmp_path)
    with pytest.raises(ProposerLoadError, match="up has values that are not finite"):
        load_adapters(tmp_path, network)


@pytest.mark.parametrize("missing", ["up", "mask_embedding"])
def test_a_missing_tensor_is_named(tmp_path, missing):
    network, _ = save_random_adapters(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != missing}, tmp_path / "model.safetensors")
    with pytest.raises(ProposerLoadError, match=f"has no tensor {missing}"):
        load_adapters(tmp_path, network)
    save_file(tensors | {"more": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ProposerLoadError, match="has an unexpected tensor more"):
        load_adapters(tmp_path, network)


def test_damaged_files_are_reported(tmp_path):
    network, _ = save_random_adapters(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ProposerLoadError, match="damaged or incomplete"):
        load_adapters(tmp_path, network)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ProposerLoadError, match=r"lacks config\.json"):
        load_adapters(tmp_path, network)


# A model that was tuned as a whole.


def test_a_model_that_was_tuned_as_a_whole_reads_its_mask_token():
    network = build("qwen3")
    tokenizer = SimpleNamespace(mask_token_id=17)
    proposer = SpaceProposer.from_tuned_model(network, tokenizer, num_masks=2)  # type: ignore[arg-type]
    model = Model(network, build_tokenizer())
    model.mask_embedder = proposer.mask_embedder
    tree, positions = tree_from_parents([3, MASK, MASK], [-1, 0, 1])
    with serving(model) as engine:
        (logits,) = run_trees(engine, TOKENS[:8], TreeInput(tree)).result()
    expected = logits_of_transformers(model, [*TOKENS[:8], 3, MASK, MASK])
    with torch.inference_mode():
        network.set_attn_implementation("sdpa")
        as_tokens = network(input_ids=torch.tensor([[*TOKENS[:8], 3, 17, 17]]), use_cache=False).logits[0]
    torch.testing.assert_close(expected, as_tokens)
    torch.testing.assert_close(logits[list(positions)], as_tokens[-3:], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "this tokenizer has none"), (VOCABULARY, rf"mask token must lie in .*, got {VOCABULARY}")],
)
def test_a_tokenizer_without_a_usable_mask_token_is_rejected(token, message):
    with pytest.raises(ProposerLoadError, match=message):
        SpaceProposer.from_tuned_model(build("llama"), SimpleNamespace(mask_token_id=token))  # type: ignore[arg-type]


# In the engine.


def load_engine_with_space():
    config = SpeculativeConfig(method="space", model=str(DEMO_MODELS / "demo-space"))
    return load_native_engine(
        EngineSettings(
            model=DEMO_TARGET,
            num_threads=1,
            max_model_len=512,
            kv_cache_memory_bytes=128 * 2**20,
            speculative_configs=(config,),
        )
    )


async def generate(engine, max_tokens, method="space"):
    """The tokens, and the statistics of the proposals."""
    request = GenerateRequest(
        prompt_token_ids=engine.model.tokenizer.encode("What is 3 + 4? Think step by step."),
        sampling_params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
        speculative_method=method,
    )
    async with aclosing(engine.generate(request)) as deltas:
        collected = [delta async for delta in deltas]
    token_ids = [token for delta in collected for token in delta.token_ids]
    return token_ids, sum_stats(delta.speculation for delta in collected)


def test_mask_predictions_are_those_of_a_plain_pass_after_the_last_accepted_token(monkeypatch):
    """In a real generation, with candidates that are accepted and others that are not."""
    received: list = []
    # Without measurements nothing seems to cost time, so that all predictions are proposed.
    monkeypatch.setattr("parse.engines.native_loader.planned_step_seconds", lambda model: [])
    monkeypatch.setattr("parse.speculative.cost_model.StepCostModel.record", lambda *_: None)
    engine = load_engine_with_space()
    extend = SpaceState.extend

    def record_and_extend(self, tokens, hidden_states, mask_prediction):
        received.append((list(tokens), mask_prediction))
        extend(self, tokens, hidden_states, mask_prediction)

    monkeypatch.setattr(SpaceState, "extend", record_and_extend)
    try:
        _, stats = asyncio.run(generate(engine, 40))
        sequence, num_compared = [], 0
        for tokens, prediction in received:
            sequence += tokens
            if prediction is not None:
                num_masks = len(prediction.token_ids)
                logits = logits_of_transformers(engine.model, [*sequence[:-1], *[MASK] * num_masks])
                probabilities = logits[-num_masks:].softmax(-1)
                assert prediction.token_ids == probabilities.argmax(-1).tolist()
                assert prediction.probabilities == pytest.approx(probabilities.max(-1).values.tolist(), abs=1e-3)
                num_compared += 1
        assert num_compared > 3
        assert stats is not None and 0 < sum(stats.accepted_per_position) < sum(stats.proposed_per_position)
    finally:
        engine.shutdown()


def test_masks_whose_logits_are_nan_predict_nothing_and_spoil_nothing():
    """Adapters may produce NaN in half precision."""
    engine = load_engine_with_space()
    with torch.no_grad():
        engine.model.mask_embedder.up.fill_(torch.nan)
    try:
        token_ids, _ = asyncio.run(generate(engine, 20))
        assert token_ids == asyncio.run(generate(engine, 20, "none"))[0]
    finally:
        engine.shutdown()


def test_measuring_steps_leaves_no_masks_behind():
    model = model_with("llama")
    measure_step_seconds(model)
    assert model.mask_embedder._mask_indices is None
