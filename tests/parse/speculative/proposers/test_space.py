"""Masks beside the text: what they say, who sees them, and where they are put."""

import asyncio
import json
from contextlib import aclosing
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from parse.config import EngineSettings, SpeculativeConfig
from parse.engines.loader import load_native_engine
from parse.engines.native.attention import STEP_ATTENTION
from parse.engines.native.model import Model
from parse.engines.native.programs import TreeInput
from parse.engines.native.step_timing import measure_step_seconds
from parse.local import DEMO, DEMO_TARGET
from parse.speculative.proposal import MaskPrediction, ProposalRequest
from parse.speculative.proposers.eagle_head import ProposerLoadError
from parse.speculative.proposers.space import MaskTokenEmbedder, SpaceProposer
from parse.speculative.proposers.space_adapters import SpaceAdapters, SpaceAdaptersConfig, decoder_layers, load_adapters
from parse.tree import MASK, tree_from_parents
from parse.types import SamplingParams, sum_stats
from tests.parse.engines.native.tiny import VOCABULARY, ask, build, serving
from training.head_checkpoints import save_adapters
from training.tokenizer import build_tokenizer as build_tokenizer

DENSE = ["llama", "qwen3", "gemma3_text", "gpt2", "opt"]
EXPERTS = ["mixtral", "deepseek_v3"]
TEXT = torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def some_adapters(network, seed=3, masks=3):
    torch.manual_seed(seed)
    config = SpaceAdaptersConfig(32, len(decoder_layers(network)), rank=5, masks=masks)
    adapters = SpaceAdapters(config)
    with torch.no_grad():
        adapters.up.normal_()
        adapters.mask_embedding.normal_()
    return adapters.requires_grad_(False)


def model_with(kind, masks=None):
    network = build(kind)
    model = Model(network, build_tokenizer())
    model.mask_embedder = some_adapters(network).attach(network) if masks is None else masks(network)
    return model


@torch.inference_mode()
def plainly(model, tokens):
    """The logits of a text with masks in it, in one pass of the library's own, without a cache."""
    network = model.network
    ids = torch.tensor([tokens])
    masks = (ids[0] == MASK).nonzero()[:, 0]
    embedded = network.get_input_embeddings()(ids.clamp(min=0))
    embedded[0, masks] = model.masks.embedding
    network.set_attn_implementation("sdpa" if network._supports_sdpa else "eager")
    try:
        with model.masks.at(masks):
            return network(inputs_embeds=embedded, use_cache=False).logits[0].float()
    finally:
        network.set_attn_implementation(STEP_ATTENTION)


TREE = [TEXT[8], MASK, MASK, 5, 9, MASK, MASK, MASK, 7], [-1, 0, 1, 0, 3, 4, 5, 6, 4]
"""Tokens and parents: two masks behind the first token; behind its third, three masks and a token."""


@pytest.mark.parametrize("kind", DENSE + EXPERTS)
def test_a_mask_sees_its_text_and_the_masks_before_it_and_nobody_sees_it(kind):
    model = model_with(kind)
    tree, place = tree_from_parents(*TREE)
    with serving(model) as engine:
        (logits,) = ask(engine, TEXT[:8], TreeInput(tree)).result()
    tokens, parents = TREE
    for node in range(len(tokens)):
        path = [node]
        while (parent := parents[path[0]]) >= 0:
            path.insert(0, parent)
        wanted = plainly(model, [*TEXT[:8], *(tokens[k] for k in path)])[-1]
        torch.testing.assert_close(logits[place[node]], wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", DENSE + EXPERTS)
def test_what_stands_beside_masks_is_the_same_bit_for_bit_whatever_is_learnt_at_them(kind):
    tree, place = tree_from_parents(*TREE)
    found = []
    for masks in (
        None,
        lambda network: some_adapters(network, seed=8).attach(network),
        lambda network: MaskTokenEmbedder(torch.zeros(32)),  # the model as it is
    ):
        with serving(model_with(kind, masks)) as engine:
            found.append(ask(engine, TEXT[:8], TreeInput(tree)).result()[0])
    tokens = [place[node] for node, token in enumerate(TREE[0]) if token != MASK]
    masks_at = [place[node] for node, token in enumerate(TREE[0]) if token == MASK]
    for other in found[1:]:
        if kind in DENSE:
            assert torch.equal(found[0][tokens], other[tokens])
        else:  # an expert rounds by how many tokens it is given, and masks are given to others now
            torch.testing.assert_close(found[0][tokens], other[tokens], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found[0][masks_at], other[masks_at])


def groups(proposal):
    """By the place of the candidate that they stand behind (0: the text), how many masks."""
    found: dict[int, int] = {}
    depth: list[tuple[int, int]] = []  # of each node: candidates, and masks, on its path
    for token, parent in zip(proposal.tokens, proposal.parents, strict=True):
        candidates, masks = depth[parent] if parent >= 0 else (0, 0)
        depth.append((candidates, masks + 1) if token == MASK else (candidates + 1, masks))
        if token == MASK:
            found[candidates] = max(found.get(candidates, 0), masks + 1)
    return found


def tree(foreseen, most=200, floor=0.0, width=3, depth=99):
    method = SpaceProposer(MaskTokenEmbedder(torch.zeros(1)), width)
    text = method.new_state()
    text.extend([1], None, foreseen)
    (proposal,) = method.propose([ProposalRequest(text, most, floor, depth)])
    assert [token for token in proposal.token_ids if token != MASK] == list(
        foreseen.tokens[: sum(token != MASK for token in proposal.token_ids)] if foreseen else ()
    )
    assert len(proposal.token_ids) <= most
    return proposal


def test_with_room_for_all_a_group_stands_behind_every_candidate_and_behind_the_text():
    found = tree(MaskPrediction((7, 8, 9), (0.9, 0.5, 0.5)))
    assert groups(found) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert len(found.token_ids) == 3 + 4 * 3


def test_before_anything_was_foreseen_there_is_one_group():
    assert groups(tree(None)) == {0: 3}


def test_groups_stand_where_the_text_is_likely_to_end():
    # The chances that it ends behind the text, the first, ...: 0.1, 0.45, 0.225, 0.225
    foreseen = MaskPrediction((7, 8, 9), (0.9, 0.5, 0.5))
    assert groups(tree(foreseen, floor=0.2)) == {1: 3, 2: 3, 3: 3}
    assert groups(tree(foreseen, most=3 + 3)) == {1: 3}
    assert groups(tree(foreseen, most=3 + 4)) == {1: 3, 2: 1}
    unlikely = tree(foreseen, floor=0.3)  # the third comes with 0.225
    assert [token for token in unlikely.token_ids if token != MASK] == [7, 8]
    assert groups(unlikely) == {1: 3, 2: 3}  # behind the second it ends with 0.45 now
    assert groups(tree(foreseen, floor=0.95)) == {0: 3}


def test_no_more_candidates_than_are_wished_for():
    found = tree(MaskPrediction((7, 8, 9), (0.9, 0.5, 0.5)), depth=2)
    assert [token for token in found.token_ids if token != MASK] == [7, 8] and groups(found) == {0: 3, 1: 3, 2: 3}


def test_the_chances_of_candidates_are_those_of_all_before_them_too():
    found = tree(MaskPrediction((7, 8, 9), (0.9, 0.5, 0.5)))
    assert found.probabilities[:3] == pytest.approx([0.9, 0.45, 0.225])


# What is loaded.


def saved(tmp_path, **changes):
    network = build("llama")
    adapters = some_adapters(network)
    save_adapters(adapters, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    return network, adapters


def test_what_was_saved_is_what_is_loaded(tmp_path):
    network, adapters = saved(tmp_path)
    found = load_adapters(tmp_path, network)
    assert found.config == adapters.config
    for name, parameter in adapters.named_parameters():
        assert torch.equal(dict(found.named_parameters())[name], parameter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, the target's 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, the target's 2"),
        ({"rank": 6}, r"down is \(2, 5, 32\), must be \(2, 6, 32\)"),
        ({"masks": 0}, "must be at least 1, masks at most 256, got rank 5 and 0 masks"),
        ({"masks": 1000}, "got rank 5 and 1000 masks"),
        ({"rank": -3}, "got rank -3"),
        ({"rank": "many"}, "is damaged"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_with_both_sizes(tmp_path, changes, message):
    network, _ = saved(tmp_path, **changes)
    with pytest.raises(ProposerLoadError, match=message):
        load_adapters(tmp_path, network)


def test_what_is_no_number_is_refused(tmp_path):
    network, adapters = saved(tmp_path)
    with torch.no_grad():
        adapters.up[1, 2, 3] = torch.nan
    save_adapters(adapters, tmp_path)
    with pytest.raises(ProposerLoadError, match="up holds what is no number"):
        load_adapters(tmp_path, network)


@pytest.mark.parametrize("lacking", ["up", "mask_embedding"])
def test_a_missing_tensor_is_named(tmp_path, lacking):
    network, _ = saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != lacking}, tmp_path / "model.safetensors")
    with pytest.raises(ProposerLoadError, match=f"lacks {lacking}"):
        load_adapters(tmp_path, network)
    save_file(tensors | {"more": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ProposerLoadError, match="holds more, which these adapters have no place for"):
        load_adapters(tmp_path, network)


def test_what_is_damaged_is_said_to_be(tmp_path):
    network, _ = saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ProposerLoadError, match="damaged or half-written"):
        load_adapters(tmp_path, network)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ProposerLoadError, match=r"lacks config\.json"):
        load_adapters(tmp_path, network)


# A model that was tuned as a whole.


def test_a_model_that_was_tuned_as_a_whole_reads_its_mask_token():
    network = build("qwen3")
    tokenizer = SimpleNamespace(mask_token_id=17)
    method = SpaceProposer.from_tuned_model(network, tokenizer, num_masks=2)  # type: ignore[arg-type]
    model = Model(network, build_tokenizer())
    model.mask_embedder = method.mask_embedder
    tree, place = tree_from_parents([3, MASK, MASK], [-1, 0, 1])
    with serving(model) as engine:
        (logits,) = ask(engine, TEXT[:8], TreeInput(tree)).result()
    wanted = plainly(model, [*TEXT[:8], 3, MASK, MASK])
    with torch.inference_mode():
        network.set_attn_implementation("sdpa")
        as_tokens = network(input_ids=torch.tensor([[*TEXT[:8], 3, 17, 17]]), use_cache=False).logits[0]
    torch.testing.assert_close(wanted, as_tokens)
    torch.testing.assert_close(logits[list(place)], as_tokens[-3:], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("token", "message"), [(None, "this one has none"), (VOCABULARY, rf"mask token is {VOCABULARY}, the target knows")]
)
def test_without_a_mask_token_it_is_refused(token, message):
    with pytest.raises(ProposerLoadError, match=message):
        SpaceProposer.from_tuned_model(build("llama"), SimpleNamespace(mask_token_id=token))  # type: ignore[arg-type]


# In the engine.


def test_what_is_foreseen_is_what_a_plain_pass_says_behind_the_last_accepted_token(monkeypatch):
    """In a real text, with candidates that are accepted and others that are not."""
    told: list = []
    # Nothing is known of what passes take, so that all that is foreseen is tried.
    monkeypatch.setattr("parse.engines.native.engine.pass_seconds", lambda model: [])
    monkeypatch.setattr("parse.speculative.cost_model.StepCostModel.record", lambda *_: None)
    way = SpeculativeConfig(method="space", model=str(DEMO / "demo-space"))
    service = load_native_engine(
        EngineSettings(model=DEMO_TARGET, num_threads=1, max_model_len=512, memory_mb=128, speculative_configs=(way,))
    )
    take = type(SpaceProposer(MaskTokenEmbedder(torch.zeros(1)), 1).new_state()).extend

    def watched(self, tokens, features, foreseen):
        told.append((list(tokens), foreseen))
        take(self, tokens, features, foreseen)

    monkeypatch.setattr("parse.speculative.proposers.space.SpaceState.extend", watched)
    prompt = service.model.tokenizer.encode("What is 3 + 4? Think step by step.")

    async def written():
        sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        async with aclosing(service.generate(prompt, sampling=sampling)) as pieces:
            return sum_stats([tokens.speculation async for tokens in pieces])

    try:
        came = asyncio.run(written())
        text, compared = [], 0
        for tokens, foreseen in told:
            text += tokens
            if foreseen is not None:
                logits = plainly(service.model, [*text[:-1], *[MASK] * len(foreseen.tokens)])
                likely = logits[-len(foreseen.tokens) :].softmax(-1)
                assert foreseen.tokens == likely.argmax(-1).tolist()
                assert foreseen.likely == pytest.approx(likely.max(-1).values.tolist(), abs=1e-3)
                compared += 1
        assert compared > 3
        assert 0 < sum(came.accepted_per_position) < sum(came.proposed_per_position)
    finally:
        service.shutdown()


def test_masks_that_come_to_no_number_foresee_nothing_and_spoil_nothing():
    """As adapters may, in half precision."""
    way = SpeculativeConfig(method="space", model=str(DEMO / "demo-space"))
    settings = EngineSettings(
        model=DEMO_TARGET, num_threads=1, max_model_len=512, memory_mb=128, speculative_configs=(way,)
    )
    service = load_native_engine(settings)
    with torch.no_grad():
        service.model.mask_embedder.up.fill_(torch.nan)  # type: ignore[union-attr]
    prompt = service.model.tokenizer.encode("What is 3 + 4? Think step by step.")

    async def written(choice):
        sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        async with aclosing(service.generate(prompt, sampling=sampling, speculation=choice)) as pieces:
            return [token async for tokens in pieces for token in tokens.token_ids]

    try:
        assert asyncio.run(written("space")) == asyncio.run(written("none"))
    finally:
        service.shutdown()


def test_passes_of_a_few_sizes_leave_no_masks_behind():
    model = model_with("llama")
    measure_step_seconds(model)
    assert model.mask_embedder._rows is None
