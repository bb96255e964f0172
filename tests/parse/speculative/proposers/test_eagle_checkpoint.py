import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.eagle3 import Eagle3Proposer
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import TargetModel
from tests.parse.speculative import naive
from tests.parse.speculative.proposers.test_eagle3 import EMBEDDING, HIDDEN_STATES, TARGET, TEXT, chain
from training.head_checkpoints import save_head

CONFIG = naive.sizes()


def propose(path, target=TARGET):
    proposer = Eagle3Proposer(*load_head(path, target), topk=2, depth=3)
    state = proposer.new_state()
    state.extend(TEXT, HIDDEN_STATES[: len(TEXT) - 1])
    return naive.propose(proposer, state, 8)


def renamed(tensors):
    return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}


def test_both_layouts_and_both_file_formats_hold_the_same_head(tmp_path):
    tensors = naive.checkpoint(CONFIG)
    expected = propose(naive.write(tmp_path / "authors", CONFIG, tensors))
    assert naive.paths(expected) == naive.tree(chain(tensors, len(TEXT)), 2, 3, 8).keys()
    assert propose(naive.write(tmp_path / "other", CONFIG, renamed(tensors))) == expected
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(json.dumps(CONFIG))
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    assert propose(tmp_path / "pickled") == expected


@pytest.mark.parametrize("with_size", [True, False])
def test_a_head_may_have_the_whole_vocabulary(tmp_path, with_size):
    config = naive.sizes(draft_vocab_size=40)
    tensors = naive.checkpoint(config)
    assert "d2t" not in tensors
    if not with_size:
        del config["draft_vocab_size"]
    expected = naive.tree(chain(tensors, len(TEXT), config=config), 2, 3, 8)
    assert naive.paths(propose(naive.write(tmp_path, config, renamed(tensors)))) == expected.keys()


def test_a_config_may_nest_its_layer_and_its_rope(tmp_path):
    tensors = naive.checkpoint(CONFIG)
    expected = propose(naive.write(tmp_path / "flat", CONFIG, tensors))
    config = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    config["rope_parameters"] = {"rope_theta": CONFIG["rope_theta"], "rope_type": "default"}
    top = {"draft_vocab_size": config.pop("draft_vocab_size"), "norm_before_residual": False}
    assert propose(naive.write(tmp_path / "nested", {**top, "transformer_layer_config": config}, tensors)) == expected


def test_a_head_may_bring_its_embeddings(tmp_path):
    tensors = naive.checkpoint(CONFIG)
    expected = propose(naive.write(tmp_path / "without", CONFIG, tensors))
    with_embedding = naive.write(tmp_path / "with", CONFIG, tensors | {"embed_tokens.weight": EMBEDDING})
    assert propose(with_embedding, TargetModel(6, torch.zeros_like(EMBEDDING))) == expected


@pytest.mark.parametrize("layers", [1, 2])
def test_a_saved_head_has_the_authors_layout_and_loads_again(tmp_path, layers):
    config = naive.sizes(num_hidden_layers=layers, **({"parallel_tokens": 3} if layers > 1 else {}))
    tensors = naive.checkpoint(config)
    head, _ = load_head(naive.write(tmp_path / "read", config, tensors), TARGET)
    save_head(head, tmp_path / "written")
    saved = load_file(tmp_path / "written" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    again, _ = load_head(tmp_path / "written", TARGET)
    assert again.config == head.config
    save_head(head, tmp_path / "half", dtype=torch.float16)
    half, _ = load_head(tmp_path / "half", TARGET)
    assert half.fc.dtype == torch.float32
    torch.testing.assert_close(half.fc, head.fc, rtol=1e-3, atol=1e-4)
    assert torch.equal(half.to_target, head.to_target)


def test_scaled_positions_are_those_of_the_library(tmp_path):
    scaling = {"rope_type": "linear", "factor": 4.0}
    tensors = naive.checkpoint(CONFIG)
    head, embedding = load_head(naive.write(tmp_path, naive.sizes(rope_scaling=scaling), tensors), TARGET)
    proposer = Eagle3Proposer(head, embedding, topk=2, depth=2)
    state = proposer.new_state()
    state.extend(TEXT, HIDDEN_STATES[: len(TEXT) - 1])
    expected = chain(tensors, len(TEXT))
    first = naive.Chain(tensors, CONFIG, EMBEDDING, TEXT[1:], HIDDEN_STATES[:7], [k / 4 for k in range(7)])
    likeliest = {naive.target_token(tensors, int(token)) for token in first.logprobs().topk(2).indices}
    assert {path[0] for path in naive.paths(naive.propose(proposer, state, 6))} == likeliest
    assert not torch.allclose(first.logprobs(), expected.logprobs())


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (2, 6, 9)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 4, 7]}, (1, 4, 7)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 5, 8]}, (2, 6, 9)),  # the outputs of the default layers
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 8]}}, (2, 6, 9)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 6, 9]}}, (2, 6, 9)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 7]}}, (1, 4, 8)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": []}}, (2, 6, 9)),
    ],
)
def test_auxiliary_layers_are_the_defaults_or_those_of_the_checkpoint(tmp_path, changes, layers):
    folder = naive.write(tmp_path, CONFIG | changes, naive.checkpoint(CONFIG))
    assert Eagle3Proposer(*load_head(folder, TargetModel(12, EMBEDDING))).aux_hidden_state_layers == layers


def broken(change):
    """A checkpoint's tensors with one of them changed."""
    tensors = naive.checkpoint(CONFIG)
    change(tensors)
    return tensors


WRONG = {
    "midlayer.self_attn.k_proj.weight": lambda t: t.pop("midlayer.self_attn.k_proj.weight"),
    "fc.weight": lambda t: t.pop("fc.weight"),
    "has no tensor d2t": lambda t: t.pop("d2t"),
    r"fc.weight must have the shape \(16, 48\) for this target, got \(16, 32\)": lambda t: t.update(
        {"fc.weight": torch.zeros(16, 32)}
    ),
    r"lm_head.weight must have the shape \(25, 16\) for this target, got \(30, 16\)": lambda t: t.update(
        {"lm_head.weight": torch.zeros(30, 16)}
    ),
    r"v_proj.weight must have the shape \(8, 32\) for this target, got \(16, 32\)": lambda t: t.update(
        {"midlayer.self_attn.v_proj.weight": torch.zeros(16, 32)}
    ),
    r"d2t must have the shape \(25,\), got \(3,\)": lambda t: t.update({"d2t": torch.zeros(3, dtype=torch.long)}),
    r"d2t maps to tokens outside 0..39": lambda t: t.update({"d2t": t["d2t"] + 30}),
    r"t2d must have the shape \(40,\), got \(9,\)": lambda t: t.update({"t2d": torch.zeros(9, dtype=torch.bool)}),
    "t2d and d2t name different tokens": lambda t: t.update({"t2d": ~t["t2d"]}),
    "has an unexpected tensor midlayer.self_attn.q_norm.weight": lambda t: t.update(
        {"midlayer.self_attn.q_norm.weight": torch.ones(4)}
    ),
    "fc.weight has values that are not finite": lambda t: t.update({"fc.weight": torch.full((16, 48), torch.nan)}),
    r"embeddings have width 8, the head has width 16": lambda t: t.update({"embed_tokens.weight": torch.zeros(40, 8)}),
}


@pytest.mark.parametrize("message", WRONG)
def test_tensors_that_do_not_fit_are_named(tmp_path, message):
    folder = naive.write(tmp_path, CONFIG, broken(WRONG[message]))
    with pytest.raises(ProposerLoadError, match=message):
        load_head(folder, TARGET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 41}, "vocab_size is 41, and the target's is 40"),
        ({"target_hidden_size": 32}, "target_hidden_size is 32, and the target's is 16"),
        ({"draft_vocab_size": 50}, "draft_vocab_size must be at most vocab_size, got 50 and 40"),
        (
            {"eagle_aux_hidden_state_layer_ids": [2, 3, 7]},
            r"auxiliary layers must lie in 0\.\.6 for this target, got \[2, 3, 7\]",
        ),
        (
            {"eagle_aux_hidden_state_layer_ids": [2, 4]},
            r"fc.weight must have the shape \(16, 32\) for this target, got \(16, 48\)",
        ),
        ({"norm_before_residual": True}, "norm_before_residual is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling must be one of .* got 'dynamic'"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"num_attention_heads": 0}, "has an invalid value"),
        ({"num_key_value_heads": -1}, "num_key_value_heads must be a whole number above 0, got -1"),
        ({"draft_vocab_size": -1}, "draft_vocab_size must be a whole number above 0, got -1"),
        ({"parallel_tokens": 2.5}, "parallel_tokens must be a whole number above 0, got 2.5"),
        ({"parallel_tokens": "12"}, "parallel_tokens must be a whole number above 0, got '12'"),
        ({"parallel_tokens": 100000}, "parallel_tokens must be at most 256"),
        ({"rope_theta": "a"}, "has an invalid value"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "has an invalid value"),
        ({"rope_scaling": "yarn"}, "has an invalid value"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    folder = naive.write(tmp_path, CONFIG | change, naive.checkpoint(CONFIG))
    with pytest.raises(ProposerLoadError, match=message):
        load_head(folder, TARGET)


def test_a_head_of_another_width_than_its_target_needs_embeddings_of_its_own(tmp_path):
    narrow = TargetModel(6, torch.zeros(40, 8))
    config = CONFIG | {"target_hidden_size": 8}
    tensors = naive.checkpoint(CONFIG) | {"fc.weight": torch.zeros(16, 24)}
    with pytest.raises(
        ProposerLoadError, match="embeddings have width 8, the head has width 16, and the checkpoint has no"
    ):
        load_head(naive.write(tmp_path / "without", config, tensors), narrow)
    head, _ = load_head(naive.write(tmp_path / "with", config, tensors | {"embed_tokens.weight": EMBEDDING}), narrow)
    assert head.fc.shape == (16, 24)


def test_folders_without_a_complete_head_are_named(tmp_path):
    with pytest.raises(ProposerLoadError, match="nowhere"):
        load_head(tmp_path / "nowhere", TARGET)
    folder = naive.write(tmp_path / "head", CONFIG, naive.checkpoint(CONFIG))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ProposerLoadError, match=r"model.safetensors is damaged or incomplete"):
        load_head(folder, TARGET)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"e")
    with pytest.raises(ProposerLoadError, match=r"pytorch_model.bin is damaged"):
        load_head(folder, TARGET)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ProposerLoadError, match=r"has neither model.safetensors nor pytorch_model.bin"):
        load_head(folder, TARGET)
    (folder / "config.json").write_text("{")
    with pytest.raises(ProposerLoadError, match=r"config.json is damaged"):
        load_head(folder, TARGET)
    save_file({}, weights)
