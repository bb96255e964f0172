"""The losses of both heads against a plain loop over anchors."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from parse.demo import DEMO_TARGET
from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import RotaryEmbedding, TargetModel
from tests.parse.speculative import naive
from tests.training.test_head_data import VOCABULARY, target, texts
from training import eagle3, loop, parallel
from training.head_checkpoints import save_head
from training.head_data import FeatureStore, batch_indices, sample_anchors
from training.loop import DamagedCheckpoint

RECIPE = eagle3.HeadRecipe(steps=4, rate=1e-2, warmup=2, texts=2, ahead=3, draft_vocabulary=18)
PARALLEL = parallel.ParallelRecipe(steps=4, rate=1e-2, warmup=2, texts=3, ahead=3, draft_vocabulary=18, share=0.8)


@pytest.fixture(scope="module")
def network():
    return target()


def new_parallel(network, outputs):
    return eagle3.new_head(network, outputs, PARALLEL, layers=PARALLEL.layers, parallel_tokens=PARALLEL.ahead)


def saved_checkpoint(head, folder):
    """Saves a head and returns its tensors and its config, as the naive head takes them."""
    save_head(head, folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def soft_loss(tensors, target_logits, logits):
    """Returns None where the target's choice is not in the vocabulary of the head."""
    chosen = torch.arange(len(tensors["d2t"])) + tensors["d2t"]
    if int(target_logits.argmax()) not in chosen.tolist():
        return None
    probabilities = target_logits[chosen].softmax(-1)
    return -sum(float(p) * float(q) for p, q in zip(probabilities, logits.log_softmax(-1), strict=True))


def summed(by_step, decay):
    return sum(decay**step * sum(losses) / len(losses) for step, losses in enumerate(by_step) if losses)


def states(network, text, layers):
    with torch.no_grad():
        out = network(torch.tensor([text.tokens]), output_hidden_states=True)
    # The features and the last hidden states are stored in half precision.
    features = torch.cat([out.hidden_states[layer][0] for layer in layers], -1).half().float()
    return features, network.lm_head(out.hidden_states[-1][0].half().float()).detach()


def test_the_loss_of_eagle3_equals_a_plain_loop_over_anchors_and_steps(network, tmp_path):
    outputs = texts()
    head = eagle3.new_head(network, outputs, RECIPE)
    library = FeatureStore(network, head.config.aux_hidden_state_layers, outputs, memory_mb=10)
    ((loss, metrics),) = eagle3.head_losses(head, network, library, RECIPE)(2)
    tensors, config = saved_checkpoint(head, tmp_path)
    embedding = network.get_input_embeddings().weight.detach()
    by_step: list[list[float]] = [[] for _ in range(RECIPE.ahead)]
    for text in (outputs[k] for k in batch_indices(len(outputs), RECIPE.texts, RECIPE.seed, 2)):
        features, logits = states(network, text, head.config.aux_hidden_state_layers)
        for anchor in range(len(text.prompt) + text.begun - 2, len(text.tokens) - 2):
            elements = range(anchor + 1)
            tokens = [text.tokens[element + 1] for element in elements]
            chain = naive.Chain(tensors, config, embedding, tokens, features[: anchor + 1], elements)
            for step in range(RECIPE.ahead):
                if anchor + 2 + step >= len(text.tokens):
                    break
                if step:
                    chain = chain.extended(text.tokens[anchor + 1 + step])
                head_logits = naive.logits(tensors, config, chain.last())
                if (one := soft_loss(tensors, logits[anchor + 1 + step], head_logits)) is not None:
                    by_step[step].append(one)
    assert loss.item() == pytest.approx(summed(by_step, 0.8), rel=1e-4)
    assert metrics["loss"] == pytest.approx(loss.item())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_the_parallel_loss_equals_a_plain_loop_over_anchors_and_masks(network, tmp_path):
    outputs = texts()
    head = new_parallel(network, outputs)
    library = FeatureStore(network, head.config.aux_hidden_state_layers, outputs, memory_mb=10)
    ((loss, _),) = parallel.head_losses(head, network, library, PARALLEL)(1)
    tensors, config = saved_checkpoint(head, tmp_path)
    embedding = network.get_input_embeddings().weight.detach()
    chosen = batch_indices(len(outputs), PARALLEL.texts, PARALLEL.seed, 1)
    sampled = sample_anchors(library.batch(chosen, PARALLEL.ahead), PARALLEL.share, 1)
    by_step: list[list[float]] = [[] for _ in range(PARALLEL.ahead)]
    for row, text in enumerate(outputs[k] for k in chosen):
        features, logits = states(network, text, head.config.aux_hidden_state_layers)
        for anchor in sampled.anchors[row][sampled.valid[row, :, 0]].tolist():
            tokens = torch.tensor(text.tokens[1 : anchor + 2])
            masks = [tensors[name].expand(PARALLEL.ahead - 1, -1) for name in ("mask_embedding", "mask_hidden")]
            embedded = torch.cat([embedding[tokens], masks[0]])
            hidden = torch.cat([features[: anchor + 1] @ tensors["fc.weight"].T, masks[1]])
            out = naive.run(tensors, config, embedded, hidden, range(len(hidden)))[anchor:]
            for step in range(PARALLEL.ahead):
                if anchor + 2 + step < len(text.tokens):
                    head_logits = naive.logits(tensors, config, out[step])
                    if (one := soft_loss(tensors, logits[anchor + 1 + step], head_logits)) is not None:
                        by_step[step].append(one)
    assert loss.item() == pytest.approx(summed(by_step, 0.8), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize(("method", "recipe"), [(eagle3, RECIPE), (parallel, PARALLEL)])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(network, tmp_path, monkeypatch, method, recipe):
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    outputs = texts(7)
    recipe = replace(recipe, memory_mb=0)  # cached features come from other batches, which round differently
    uninterrupted = method.train_head(network, outputs, recipe, tmp_path / "a")
    batches = method.batch_indices

    def stopped(count, size, seed, step):
        if step == 2:
            raise KeyboardInterrupt
        return batches(count, size, seed, step)

    monkeypatch.setattr(method, "batch_indices", stopped)
    with pytest.raises(KeyboardInterrupt):
        method.train_head(network, outputs, recipe, tmp_path / "b")
    monkeypatch.setattr(method, "batch_indices", batches)
    resumed = method.train_head(network, outputs, recipe, tmp_path / "b")
    again = method.train_head(network, outputs, recipe, tmp_path / "c")
    for one, other, third in zip(uninterrupted.parameters(), resumed.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
    with pytest.raises(DamagedCheckpoint, match="another schedule"):
        method.train_head(network, outputs, replace(recipe, steps=5), tmp_path / "b")


def test_training_reduces_the_loss(network, tmp_path):
    recipe = replace(RECIPE, steps=12, rate=3e-2)
    outputs = texts(6)
    head = eagle3.new_head(network, outputs, recipe)
    library = FeatureStore(network, head.config.aux_hidden_state_layers, outputs, memory_mb=10)
    losses = eagle3.head_losses(head, network, library, recipe)
    before = next(losses(0))[0].item()
    loop.train(tmp_path, head, losses, recipe.schedule, build_optimizers=loop.adamw)
    assert next(losses(0))[0].item() < 0.8 * before


@pytest.mark.parametrize("method", [eagle3, parallel])
def test_the_command_writes_a_head_and_its_card(tmp_path, monkeypatch, capsys, method):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Kim has {k} shells."}) + "\n" for k in range(6)))
    name = method.__name__.split(".")[-1]
    arguments = (
        f"{name} --target {DEMO_TARGET} --prompts {prompts} --out {tmp_path / 'head'} --runs {tmp_path / 'runs'}"
    )
    small = f"{arguments} --count 6 --longest 9 --steps 2 --texts 2 --dtype float16 --threads 1".split()
    monkeypatch.setattr(sys, "argv", small)
    method.main()
    names = {"config.json", "model.safetensors", "README.md", "figures.json", "training.svg"}
    assert {file.name for file in (tmp_path / "head").iterdir()} == names
    assert "2 steps, 5 texts that the target generated" in (tmp_path / "head" / "README.md").read_text()
    before = (tmp_path / "head" / "model.safetensors").read_bytes()
    method.main()  # continues where it stopped: at the end
    assert (tmp_path / "head" / "model.safetensors").read_bytes() == before
    monkeypatch.setattr(sys, "argv", [*small, "--outputs", "x.jsonl"])
    with pytest.raises(SystemExit):
        method.main()
    assert "not allowed with argument" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [name, "--outputs", str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(SystemExit, match=r"nowhere\.jsonl"):
        method.main()


def test_training_continues_from_a_head(network, tmp_path):
    outputs = texts()
    for name, head in (
        ("eagle3", eagle3.new_head(network, outputs, RECIPE)),
        ("parallel", new_parallel(network, outputs)),
    ):
        save_head(head, tmp_path / name)
    recipe = replace(RECIPE, start=tmp_path / "eagle3", draft_vocabulary=7, seed=5)
    head = eagle3.new_head(network, outputs, recipe)
    before, _ = load_head(tmp_path / "eagle3", TargetModel.of(network))
    assert all(torch.equal(one, other) for one, other in zip(head.parameters(), before.parameters(), strict=True))
    eagle3.train_head(network, outputs, recipe, tmp_path / "run")
    with pytest.raises(ProposerLoadError, match="a head of another method"):
        eagle3.new_head(network, outputs, replace(recipe, start=tmp_path / "parallel"))
    wider = eagle3.new_head(
        network, outputs, replace(PARALLEL, start=tmp_path / "parallel"), layers=2, parallel_tokens=5
    )
    assert wider.config.parallel_tokens == 5


def test_a_new_head_starts_with_the_lm_head_of_its_target(network):
    outputs = texts()
    head = eagle3.new_head(network, outputs, RECIPE)
    assert torch.equal(head.lm_head, network.lm_head.weight[head.to_target])
    assert head.config.aux_hidden_state_layers == TargetModel.of(network).default_aux_layers
    assert RotaryEmbedding(head.config, head.fc).cos_sin([5])[0].shape == (1, 1, 4)
    other = eagle3.new_head(network, outputs, RECIPE)
    assert all(torch.equal(one, two) for one, two in zip(head.parameters(), other.parameters(), strict=True))


def test_a_small_model_without_rotary_positions_can_have_a_head(tmp_path):
    """Such as OPT, which the demo draft is: it has learned positions, layer norms with biases and only two layers."""
    torch.manual_seed(3)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    network, outputs = OPTForCausalLM(config).eval(), texts()
    assert TargetModel.of(network).default_aux_layers == (1, 2)
    for module, recipe in ((eagle3, RECIPE), (parallel, PARALLEL)):
        head = module.train_head(network, outputs, recipe, tmp_path / module.__name__ / "run")
        save_head(head, tmp_path / module.__name__ / "head")
        loaded, _ = load_head(tmp_path / module.__name__ / "head", TargetModel.of(network))
        assert loaded.config == head.config
        assert (loaded.config.intermediate_size, loaded.config.num_key_value_heads) == (24, 4)


def test_the_mlp_of_a_head_is_as_wide_as_that_of_its_target():
    sizes: dict[str, Any] = dict(n_embd=16, n_layer=2, n_head=4, vocab_size=VOCABULARY)
    for width, expected in ((None, 64), (40, 40)):
        network = GPT2LMHeadModel(GPT2Config(n_inner=width, **sizes))
        assert eagle3.new_head(network, texts(), RECIPE).config.intermediate_size == expected


def test_a_target_whose_embeddings_have_another_width_is_rejected():
    config = OPTConfig(vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=8, ffn_dim=24, num_attention_heads=4)
    with pytest.raises(ProposerLoadError, match="embeddings of width 8 and hidden states of width 16"):
        eagle3.new_head(OPTForCausalLM(config), texts(), RECIPE)


@pytest.mark.parametrize("num_layers", range(1, 40))
def test_the_default_auxiliary_layers_are_different_layers_of_the_model(num_layers):
    layers = TargetModel(num_layers, torch.zeros(1, 1)).default_aux_layers
    assert list(layers) == sorted(set(layers)) and layers[0] > 0 and layers[-1] <= num_layers
