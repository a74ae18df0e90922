"""bf16, float32 master weights, activation checkpointing and compilation change speed and memory, not the method."""

from __future__ import annotations

import logging

import pytest
import torch
from reference import contrastive
from runs import assert_same, first_batch, losses
from safetensors.torch import load_file
from tolerances import EXACT, LOGGED
from torch._dynamo.utils import counters
from toys import tiny_clip, tiny_processor

from carot_hf.models.backbones import pair_inputs
from carot_hf.run.step import LossStep

CACHE = {"contrastive_batch_size": 12}


def train(make_trainer, *, exact=False, **options):
    """A run of few steps; ``exact``: in float64."""
    model = tiny_clip(tiny_processor().tokenizer).double() if exact else None
    trainer = make_trainer(model, optim="sgd", label_smoothing_factor=0.1, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("cache", [{}, CACHE], ids=["plain", "cache"])
def test_activation_checkpointing_gives_the_same_weights(make_trainer, cache):
    plain = train(make_trainer, exact=True, **cache)
    checkpointed = train(make_trainer, exact=True, activation_checkpointing=True, **cache)
    assert checkpointed.model.vision_model.encoder.layers[0].gradient_checkpointing
    assert not plain.model.vision_model.encoder.layers[0].gradient_checkpointing
    assert_same(plain, checkpointed, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [{}, CACHE], ids=["plain", "cache"])
def test_compilation_gives_the_same_weights(make_trainer, cache):
    plain = train(make_trainer, exact=True, **cache)
    compiled = train(make_trainer, exact=True, torch_compile=True, torch_compile_backend="eager", **cache)
    assert_same(plain, compiled, EXACT)
    assert losses(compiled) == pytest.approx(losses(plain), rel=LOGGED)


def test_the_teacher_is_compiled_as_well(make_trainer):
    compiled = make_trainer(torch_compile=True, torch_compile_backend="eager")
    torch._dynamo.reset()
    counters.clear()
    compiled._step.taught(pair_inputs(compiled._prepare_inputs(first_batch(compiled))))
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
def test_the_first_pass_of_the_cache_is_compiled(make_trainer, monkeypatch):
    """Without a teacher, every graph that the pass makes is the student's."""
    trainer = make_trainer(preset="flyp", torch_compile=True, torch_compile_backend="eager", max_steps=1, **CACHE)
    embed, graphs = LossStep._embed_batches, []

    def counted(step, *args):
        torch._dynamo.reset()
        counters.clear()
        result = embed(step, *args)
        graphs.append(counters["stats"]["unique_graphs"])
        return result

    monkeypatch.setattr(LossStep, "_embed_batches", counted)
    trainer.train()
    assert len(graphs) == 1
    assert graphs[0] > 0


@pytest.mark.parametrize("cache", [{}, CACHE], ids=["plain", "cache"])
def test_bf16_stays_near_float32(make_trainer, cache):
    """bfloat16 keeps 8 bits: the losses differ by about 1 %, and they do differ."""
    plain = train(make_trainer, learning_rate=1e-3, **cache)
    half = train(make_trainer, learning_rate=1e-3, bf16=True, **cache)
    assert losses(half) == pytest.approx(losses(plain), rel=0.05)
    assert losses(half) != losses(plain)


def test_bf16_rounds_the_towers_but_not_the_loss(make_trainer):
    """The loss is that of the rounded embeddings, worked out by a slow loop in float64; weights stay float32."""
    trainer = make_trainer(bf16=True)
    batch = first_batch(trainer)
    with trainer.accelerator.autocast():
        terms, outputs = trainer.loss_terms(trainer.model, batch)
    scale = trainer.model.logit_scale.detach().double().exp()
    image, text = (
        torch.nn.functional.normalize(embeds.detach().double(), dim=-1)
        for embeds in (outputs.image_embeds, outputs.text_embeds)
    )
    expected = contrastive((scale * image @ text.T).tolist(), (scale * text @ image.T).tolist(), torch.eye(4).tolist())
    assert terms["contrastive"].dtype == terms["distillation"].dtype == torch.float32
    assert terms["contrastive"].item() == pytest.approx(expected, abs=1e-5)
    assert terms["distillation"].item() == pytest.approx(0.0, abs=1e-6)  # the teacher is rounded alike
    full = trainer.model(**batch)
    assert (full.image_embeds - outputs.image_embeds).abs().max() > 1e-4
    trainer.train()
    for network in (trainer.model, trainer.teacher.model):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    moments = [state["exp_avg"].dtype for state in trainer.optimizer.state_dict()["state"].values()]
    assert set(moments) == {torch.float32}


def test_a_bf16_checkpoint_is_trained_in_float32(make_trainer, processor, tmp_path, caplog):
    half = tiny_clip(processor.tokenizer).bfloat16()
    widened = {name: value.float() for name, value in half.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="carot_hf"):
        trainer = make_trainer(half, bf16=True)
    assert "it is trained and saved in float32" in caplog.text
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value.float(), widened[name]), name
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {value.dtype for name, value in saved.items() if value.is_floating_point()} == {torch.float32}
    assert not torch.equal(saved["visual_projection.weight"], saved["visual_projection.weight"].bfloat16().float())


def test_a_bf16_checkpoint_is_trained_in_bf16_if_asked(make_trainer, processor, tmp_path, caplog):
    """Student and its moments are bfloat16, teacher and losses float32; a temperature needs float32 again."""
    half = tiny_clip(processor.tokenizer).bfloat16()
    with caplog.at_level(logging.INFO, logger="carot_hf"):
        trainer = make_trainer(half, float32_weights=False, **CACHE)
    assert "trained and saved in bfloat16" in caplog.text
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    terms, _ = trainer.loss_terms(trainer.model, first_batch(trainer))
    assert {term.dtype for term in terms.values()} == {torch.float32}
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.teacher.model.parameters()} == {torch.float32}
    moments = {state["exp_avg"].dtype for state in trainer.optimizer.state_dict()["state"].values()}
    assert moments == {torch.bfloat16}
    weight = "visual_projection.weight"
    assert not torch.equal(trainer.model.state_dict()[weight], start[weight])
    trainer.save_model(str(tmp_path / "saved"))
    assert load_file(tmp_path / "saved" / "model.safetensors")[weight].dtype == torch.bfloat16
    trainer.calibrate()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_a_classifier_is_trained_in_bf16_if_asked(make_trainer, processor):
    trainer = make_trainer(
        tiny_clip(processor.tokenizer).bfloat16(), preset="lp-ft", float32_weights=False, teacher_update_every=0
    )
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_float16_weights_are_not_trained_as_they_are(make_trainer, processor):
    with pytest.raises(ValueError, match=r"Expected bfloat16 with `float32_weights` False, got float16"):
        make_trainer(tiny_clip(processor.tokenizer).half(), float32_weights=False)
