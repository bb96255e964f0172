"""The loss of the adapters against a plain loop over anchors, and their measured acceptance against the engine."""

import asyncio
import json
import sys
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch

from parse.config import EngineSettings, SpeculativeConfig
from parse.demo import DEMO_MODELS, DEMO_TARGET
from parse.engines.native_loader import load_native_engine
from parse.requests import GenerateRequest
from parse.speculative.proposers.space_adapters import load_adapters
from parse.types import SamplingParams, sum_stats
from tests.training.test_head_data import target, texts
from training import loop, space
from training.acceptance import generate_held_out
from training.checkpoints import load_model
from training.evaluate import round_floats
from training.head_checkpoints import save_adapters
from training.head_data import batch_indices
from training.loop import DamagedCheckpoint

RECIPE = space.SpaceRecipe(steps=4, rate=1e-2, warmup=2, texts=3, ahead=3, rank=4, share=1.0)


@pytest.fixture(autouse=True)
def in_full(monkeypatch):
    """Turns off bfloat16, which rounds."""
    monkeypatch.setattr(space, "bfloat16_is_faster", lambda device: False)


def grown(network, recipe=RECIPE):
    """Returns adapters that change the output at masks."""
    adapters = space.new_adapters(network, recipe).attach(network)
    with torch.no_grad():
        adapters.up.normal_(std=0.3)
    return adapters


def forward_logits(adapters, network, tokens, masks):
    """Returns the logits at masks after a text, from one plain pass. Without masks, those of the tokens of the text."""
    ids = torch.tensor([tokens])
    embedded = network.get_input_embeddings()(ids)
    network.set_attn_implementation("eager")
    with torch.no_grad():
        if not masks:
            return network(input_ids=ids).logits[0]
        embedded = torch.cat([embedded, adapters.mask_embedding.expand(1, masks, -1)], 1)
        with adapters.at(torch.arange(len(tokens), len(tokens) + masks)):
            return network(inputs_embeds=embedded).logits[0, -masks:]


def test_the_loss_equals_a_plain_loop_over_masks_and_anchors():
    network, outputs = target(), texts()
    adapters = grown(network)
    ((loss, metrics),) = space.adapter_losses(adapters, network, outputs, RECIPE)(2)
    by_mask: list[list[float]] = [[] for _ in range(RECIPE.ahead)]
    same: list[list[bool]] = [[] for _ in range(RECIPE.ahead)]
    for text in (outputs[k] for k in batch_indices(len(outputs), RECIPE.texts, RECIPE.seed, 2)):
        says = forward_logits(adapters, network, text.tokens, 0)
        for anchor in range(len(text.prompt) + text.begun - 1, len(text.tokens)):
            logits = forward_logits(adapters, network, text.tokens[: anchor + 1], RECIPE.ahead)
            for mask in range(RECIPE.ahead):
                position = anchor + 1 + mask  # the target's output after that token, one after its next one
                if position < len(text.tokens):
                    chances = says[position].softmax(-1)
                    by_mask[mask].append(-float((chances * logits[mask].log_softmax(-1)).sum()))
                    same[mask].append(bool(logits[mask].argmax() == chances.argmax()))
    total = sum(space.DECAY**mask * sum(each) / len(each) for mask, each in enumerate(by_mask) if each)
    assert loss.item() == pytest.approx(total, rel=1e-3)
    assert metrics["same 1"] == pytest.approx(sum(same[0]) / len(same[0]), abs=1e-6)


def test_training_changes_only_the_adapters(tmp_path):
    network, outputs = target(), texts()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    recipe = replace(RECIPE, steps=60, rate=3e-2, texts=5)
    adapters = space.train_adapters(network, outputs, recipe, tmp_path)
    ((_, metrics),) = space.adapter_losses(adapters, network, outputs, recipe)(0)
    assert all(metrics[f"same {mask}"] > 0.7 for mask in (1, 2, 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch):
    uninterrupted = space.train_adapters(target(), texts(), RECIPE, tmp_path / "whole")
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    adapter_losses, steps = space.adapter_losses, []

    def twice(*outputs):
        losses = adapter_losses(*outputs)

        def interrupted_losses(step):
            steps.append(step)
            if len(steps) == 3:
                raise KeyboardInterrupt
            return losses(step)

        return interrupted_losses

    monkeypatch.setattr(space, "adapter_losses", twice)
    with pytest.raises(KeyboardInterrupt):
        space.train_adapters(target(), texts(), RECIPE, tmp_path / "torn")
    torn = space.train_adapters(target(), texts(), RECIPE, tmp_path / "torn")
    assert steps == [0, 1, 2, 2, 3]
    for one, two in zip(uninterrupted.parameters(), torn.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(DamagedCheckpoint, match="another schedule"):
        space.train_adapters(target(), texts(), replace(RECIPE, steps=9), tmp_path / "torn")


def test_training_continues_from_adapters(tmp_path):
    adapters = grown(target())
    save_adapters(adapters, tmp_path)
    again = space.new_adapters(target(), replace(RECIPE, start=tmp_path))
    assert torch.equal(again.up, adapters.up) and again.up.requires_grad
    with pytest.raises(ValueError, match="trained for 3 masks, not 5"):
        space.new_adapters(target(), replace(RECIPE, start=tmp_path, ahead=5))


def test_the_command_writes_adapters_and_their_card(tmp_path, monkeypatch):
    outputs = tmp_path / "outputs.jsonl"
    outputs.write_text(
        "".join(json.dumps({"prompt": t.prompt, "output": t.output, "begun": t.begun}) + "\n" for t in texts(40))
    )
    target().save_pretrained(tmp_path / "target")
    arguments = f"--target {tmp_path / 'target'} --outputs {outputs} --out {tmp_path / 'out'} --runs {tmp_path / 'run'}"
    sizes = "--steps 2 --texts 2 --ahead 3 --rank 4 --threads 1"
    monkeypatch.setattr(sys, "argv", ["space", *arguments.split(), *sizes.split()])
    space.main()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "These adapters let `target` propose tokens" in card and "rank 4 after each of 6 layers" in card
    assert (tmp_path / "out" / "training.svg").is_file()
    held_out = texts(40)[-2:]
    expected = round_floats(space.evaluate_adapters(tmp_path / "out", target(), held_out))
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert {name: figures[name] for name in expected} == expected and figures["trained"].startswith("2 steps, 38 texts")


def test_the_passes_of_the_card_are_those_of_the_engine(monkeypatch):
    """The card counts passes from one plain pass over each text. The engine decodes step by step."""
    # Without measured step times the engine places a group of masks after every candidate, as the card does.
    monkeypatch.setattr("parse.engines.native_loader.planned_step_seconds", lambda model: [])
    monkeypatch.setattr("parse.speculative.cost_model.StepCostModel.record", lambda *_: None)
    proof = [text for text in generate_held_out(DEMO_TARGET, 8, seed=5, num_threads=1) if not text.begun][:3]
    network = load_model(DEMO_MODELS / "demo-target")
    adapters = load_adapters(DEMO_MODELS / "demo-space", network).attach(network)
    counted = space.measure_acceptance(adapters, network, proof)
    config = SpeculativeConfig(method="space", model=str(DEMO_MODELS / "demo-space"))
    engine = load_native_engine(
        EngineSettings(
            model=DEMO_TARGET,
            num_threads=1,
            max_model_len=768,
            kv_cache_memory_bytes=256 * 2**20,
            speculative_configs=(config,),
        )
    )

    async def passes(text):
        request = GenerateRequest(prompt_token_ids=text.prompt, sampling_params=SamplingParams(temperature=0.0))
        async with aclosing(engine.generate(request)) as deltas:
            return sum_stats([delta.speculation async for delta in deltas])

    try:
        stats = [asyncio.run(passes(text)) for text in proof]
    finally:
        engine.shutdown()
    assert sum(one.passes for one in stats) == counted.passes
    assert sum(sum(one.accepted_per_position) for one in stats) == counted.tokens - counted.passes
