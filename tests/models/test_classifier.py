"""The classifier against CLIP's own pieces, the stock pipeline and scikit-learn."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from tolerances import EXACT, float32_bound
from toys import tiny_clip
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from carot_hf import bake_temperature, unbake_temperature
from carot_hf.models import classifier
from carot_hf.models.classifier import (
    CLIPClassifier,
    CLIPClassifierConfig,
    export_classifier,
    label_names,
)
from carot_hf.models.linear_probe import linear_probe

NAMES = ["cat", "dog", "missile", "tree", "missile"]


def pixels(rows=7, size=16, seed=0):
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(model, rows=5):
    config = model.config.text_config
    return torch.tensor([[config.bos_token_id, 40 + 3 * row, 50 + row, config.eos_token_id] for row in range(rows)])


@torch.no_grad()
def embed_classes(model):
    features = model.get_text_features(input_ids=tokens(model)).pooler_output
    return F.normalize(features if model.dtype == torch.float64 else features.float(), dim=-1)


@torch.no_grad()
def zero_shot(model):
    """Probabilities of the stock CLIPModel, for the classes of `embed_classes`."""
    return model(input_ids=tokens(model), pixel_values=pixels()).logits_per_image.softmax(dim=-1)


@torch.no_grad()
def probabilities(model):
    return model(pixels()).logits.softmax(dim=-1)


def states_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


@pytest.fixture
def clip(model):
    """The tiny model with a confident temperature and spread-out image features."""
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100.0))
    return model.eval()


@pytest.fixture
def exact(clip):
    """The same in float64: for proofs that two paths are one."""
    return clip.double()


@pytest.fixture
def exported(clip):
    return export_classifier(clip, embed_classes(clip), NAMES)


# The model


def test_logits_are_those_of_the_pieces_of_clip_taken_one_by_one(exact):
    clip, exported = exact, export_classifier(exact, embed_classes(exact), NAMES)
    weights, multiplier = embed_classes(clip), clip.logit_scale.exp().item()
    with torch.no_grad():
        pooled = clip.vision_model(pixel_values=pixels()).pooler_output.double()
        logits = exported(pixels()).logits
    for row, state in enumerate(pooled):
        feature = [float(sum(state * line)) for line in clip.visual_projection.weight.detach().double()]
        length = math.sqrt(sum(value * value for value in feature))
        for column, weight in enumerate(weights.double().tolist()):
            cosine = sum(a * b for a, b in zip(feature, weight, strict=True)) / length
            assert float(logits[row, column]) == pytest.approx(multiplier * cosine, abs=EXACT)


@pytest.mark.parametrize("multiplier", [1.0, 14.0, 100.0])
def test_probabilities_are_those_of_the_zero_shot_model(exact, multiplier):
    clip = exact
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(multiplier))
    expected = zero_shot(clip)
    assert expected.max(dim=-1).values.std() > 1e-3  # the rows differ, so that something is compared
    torch.testing.assert_close(
        probabilities(export_classifier(clip, embed_classes(clip), NAMES)), expected, rtol=0, atol=EXACT
    )


def test_another_width_and_projection():
    torch.manual_seed(1)
    tower = {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 99, "bos_token_id": 97}
    vision = {**tower, "hidden_size": 24, "intermediate_size": 20, "image_size": 16, "patch_size": 4}
    config = CLIPConfig(text_config={**text, "eos_token_id": 98}, vision_config=vision, projection_dim=10)
    clip = CLIPModel(config).double().eval()
    exported = export_classifier(clip, embed_classes(clip))
    assert exported.visual_projection.weight.shape == (10, 24)
    assert exported.head.weight.shape == (5, 10)
    assert exported.config.projection_dim == 10
    assert exported.config.vision_config.patch_size == 4
    torch.testing.assert_close(probabilities(exported), zero_shot(clip), rtol=0, atol=EXACT)


def test_image_features_are_those_of_clip(clip, exported):
    with torch.no_grad():
        expected = clip.get_image_features(pixel_values=pixels())
        found = exported.get_image_features(pixel_values=pixels())
    assert type(found) is type(expected)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_the_loss_is_the_mean_cross_entropy_and_its_gradient_reaches_everything(exported):
    labels = torch.tensor([0, 4, 2, 1, 3, 3, 2])
    output = exported.train()(pixels(), labels=labels)
    log_probs = output.logits.detach().double().log_softmax(dim=-1)
    by_hand = -sum(float(log_probs[row, label]) for row, label in enumerate(labels)) / 7
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(by_hand, rel=1e-6)
    assert output.loss.item() == F.cross_entropy(output.logits, labels).item()
    output.loss.backward()
    for name, parameter in exported.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > (0 if "k_proj.bias" in name else 1e-8), name
    without = exported(pixels())
    assert without.loss is None
    left_out = exported(pixels(), labels=torch.where(labels == 3, -100, labels))
    kept = [row for row in range(7) if labels[row] != 3]
    assert left_out.loss.item() == pytest.approx(-log_probs[kept, labels[kept]].mean().item(), rel=1e-6)


def test_autocast_stops_before_the_normalisation(exported):
    labels = torch.arange(5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = exported(pixels(5), labels=labels)
        features = exported.get_image_features(pixels(5)).pooler_output
    assert features.dtype == torch.bfloat16
    assert output.logits.dtype == output.loss.dtype == torch.float32
    rows = features.double() / features.double().norm(dim=-1, keepdim=True)
    expected = rows @ exported.head.weight.detach().double().T + exported.head.bias.detach().double()
    bound = float32_bound(100, 12, operations=1)  # the head alone works in float32
    torch.testing.assert_close(output.logits, expected.float(), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_logits_and_keeps_the_head_when_loaded(exported, tmp_path, dtype):
    exported.save_pretrained(tmp_path)
    loaded = CLIPClassifier.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.vision_model.embeddings.class_embedding.dtype == loaded.visual_projection.weight.dtype == dtype
    assert torch.equal(loaded.head.weight, exported.head.weight)  # float32: a temperature in it would be rounded
    for half in (loaded, exported.to(dtype)):
        output = half(pixels(), labels=torch.zeros(7, dtype=torch.int64))
        assert output.logits.dtype == output.loss.dtype == torch.float32
        output.loss.backward()
        assert half.head.weight.grad.abs().max() > 0


def test_random_weights_have_the_spread_of_their_width():
    vision = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    made = CLIPClassifier(CLIPClassifierConfig(vision_config=vision, projection_dim=256, num_labels=100))
    assert made.visual_projection.weight.std().item() == pytest.approx(1 / 8, rel=0.03)  # 64 ** -0.5
    assert made.head.weight.std().item() == pytest.approx(1 / 16, rel=0.03)  # 256 ** -0.5
    assert torch.equal(made.head.bias, torch.zeros(100))
    wide = CLIPClassifierConfig(vision_config=vision, projection_dim=256, num_labels=100, initializer_factor=3.0)
    assert CLIPClassifier(wide).head.weight.std().item() == pytest.approx(3 / 16, rel=0.03)


def test_a_head_of_another_size_starts_anew_and_leaves_the_rest(exported, tmp_path):
    exported.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        CLIPClassifier.from_pretrained(tmp_path, num_labels=3)
    loaded = CLIPClassifier.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert loaded(pixels()).logits.shape == (7, 3)
    assert 0 < loaded.head.weight.abs().max() < 2  # 12 ** -0.5 times a normal number, not times 100
    assert torch.equal(loaded.visual_projection.weight, exported.visual_projection.weight)


def test_checkpointed_activations_give_the_same_gradient(exported):
    twin = copy.deepcopy(exported.double())
    enable = getattr(twin, "activation_checkpointing_enable", None) or twin.gradient_checkpointing_enable
    enable()
    assert all(layer.gradient_checkpointing for layer in twin.vision_model.encoder.layers)
    labels = torch.arange(5)
    for one in (exported.train(), twin.train()):
        one(pixels(5), labels=labels).loss.backward()
    for (name, one), other in zip(exported.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=EXACT, atol=EXACT, msg=name)


def test_options_of_the_tower_pass_through(exact):
    clip, exported = exact, export_classifier(exact, embed_classes(exact), NAMES)
    large = pixels(2, 24)
    with pytest.raises(ValueError, match="24"):
        exported(large)
    with torch.no_grad():
        features = clip.get_image_features(pixel_values=large, interpolate_pos_encoding=True).pooler_output
        expected = F.normalize(features, dim=-1) @ exported.head.weight.T
        found = exported(large, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
    output = exported(pixels(), output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(7, 5, 16)] * 3
    assert exported(pixels()).hidden_states is None
    exported.set_attn_implementation("eager")
    assert exported(pixels(), output_attentions=True).attentions[0].shape == (7, 2, 5, 5)


def test_tuples_on_request(exported):
    labels = torch.zeros(7, dtype=torch.int64)
    output = exported(pixels(), labels=labels)
    loss, logits = exported(pixels(), labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    exported.config.return_dict = False
    assert torch.equal(exported(pixels())[0], output.logits)
    assert torch.equal(
        exported.get_image_features(pixels())[1], exported.get_image_features(pixels(), return_dict=True).pooler_output
    )
    assert torch.equal(exported(pixels(), return_dict=True).logits, output.logits)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_stock_trainer_divides_the_loss_by_the_accumulation_steps(exported, tmp_path, steps):
    data = [{"pixel_values": image, "labels": row % 5} for row, image in enumerate(pixels(8))]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8 // steps,
        gradient_accumulation_steps=steps,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    before = copy.deepcopy(exported)
    before(pixels(8), labels=torch.arange(8) % 5).loss.backward()
    Trainer(model=exported, args=args, train_dataset=data).train()
    moved = (before.head.weight - exported.head.weight).detach() / 0.1
    torch.testing.assert_close(moved, before.head.weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(6, dtype=torch.int64), r"shape \(7,\), got torch.int64 of shape \(6,\)"),
        (torch.zeros(7, 5, dtype=torch.int64), r"of shape \(7, 5\).*argmax"),
        (torch.zeros(7), "integer `labels`.*got torch.float32"),
        (torch.zeros(7, dtype=torch.bool), "got torch.bool"),
    ],
)
def test_labels_are_checked(exported, labels, message):
    with pytest.raises(ValueError, match=f"(?s)Expected.*{message}"):
        exported(pixels(), labels=labels)


def test_a_label_beyond_the_head_raises(exported):
    with pytest.raises(IndexError, match="5"):
        exported(pixels(), labels=torch.tensor([0, 1, 2, 3, 4, 5, 0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 1}, "at least 2 labels, got 1"),
        ({"id2label": {0: "only"}}, "at least 2 labels, got 1"),
        ({"problem_type": "multi_label_classification"}, "got 'multi_label_classification'"),
        ({"problem_type": "regression"}, "got 'regression'"),
    ],
)
def test_the_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        CLIPClassifierConfig(**options)


# From CLIP


def test_the_head_starts_at_the_scaled_class_embeddings(clip):
    embeds = embed_classes(clip)
    made = CLIPClassifier.from_clip(clip, embeds, NAMES)
    with torch.no_grad():
        clip.logit_scale.fill_(0.7)
    warm = CLIPClassifier.from_clip(clip, embeds)
    expected = torch.tensor([[math.exp(clip.logit_scale.item()) * value for value in row] for row in embeds.tolist()])
    assert torch.equal(warm.head.weight, expected)
    torch.testing.assert_close(made.head.weight, 100 * embeds, rtol=1e-6, atol=0)
    assert torch.equal(made.head.bias, torch.zeros(5))


def test_the_source_stays_as_it_is_and_shares_nothing(clip):
    before, config = copy.deepcopy(clip), copy.deepcopy(clip.config.to_dict())
    embeds = embed_classes(clip)
    kept = embeds.clone()
    random_state = torch.get_rng_state()
    made = export_classifier(clip, embeds, NAMES)
    assert torch.equal(torch.get_rng_state(), random_state)
    theirs = {parameter.untyped_storage().data_ptr() for parameter in [*clip.parameters(), *clip.buffers(), embeds]}
    assert not theirs & {part.untyped_storage().data_ptr() for part in [*made.parameters(), *made.buffers()]}
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    made.config.vision_config.image_size = 99
    made.config.calibration = {"temperature": 2.0}
    assert states_equal(clip, before)
    assert torch.equal(embeds, kept)
    assert clip.config.to_dict() == config
    assert all(parameter.grad is None and parameter.requires_grad for parameter in clip.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_attention_follow_the_source(clip, training):
    clip.set_attn_implementation("eager")
    clip.requires_grad_(False).train(training)
    made = CLIPClassifier.from_clip(clip, embed_classes(clip))
    assert all(module.training == training for module in made.modules())
    assert made.config.vision_config._attn_implementation == "eager"
    assert all(parameter.requires_grad for parameter in made.parameters())
    assert not export_classifier(clip, embed_classes(clip)).training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_source_in_half_precision_becomes_float32(clip, tmp_path, dtype):
    clip.to(dtype).save_pretrained(tmp_path)
    half = CLIPModel.from_pretrained(tmp_path)
    assert half.dtype == dtype
    embeds = embed_classes(half)
    made = CLIPClassifier.from_clip(half, embeds)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    assert half.dtype == dtype
    torch.testing.assert_close(probabilities(made), zero_shot_of(half, embeds), rtol=0, atol=float32_bound(100, 12))
    made.save_pretrained(tmp_path / "made")
    assert {value.dtype for value in load_file(tmp_path / "made" / "model.safetensors").values()} == {torch.float32}
    assert CLIPClassifier.from_pretrained(tmp_path / "made").dtype == torch.float32


@torch.no_grad()
def zero_shot_of(half, embeds):
    """Probabilities of a half-precision model worked out in float32."""
    whole = copy.deepcopy(half).float()
    features = F.normalize(whole.get_image_features(pixel_values=pixels()).pooler_output, dim=-1)
    return (whole.logit_scale.exp() * features @ embeds.T).softmax(dim=-1)


def test_a_model_that_is_no_clip_is_refused(exported):
    with pytest.raises(TypeError, match=r"CLIPModel, got CLIPClassifier.*Unwrap"):
        CLIPClassifier.from_clip(exported, torch.eye(12))


@pytest.mark.parametrize(
    ("embeds", "names", "message"),
    [
        (torch.eye(13)[:5], None, r"shape \(K, 12\) with K >= 2, got torch.float32 of shape \(5, 13\)"),
        (torch.eye(12)[:1], None, r"K >= 2, got .*\(1, 12\)"),
        (torch.eye(12)[0], None, r"of shape \(12,\)"),
        (torch.eye(12, dtype=torch.int64), None, "float dtype.*got torch.int64"),
        (2 * torch.eye(12), None, "length 1 in `class_embeddings`, got length 2 in row 0.*normalize"),
        (torch.cat([torch.eye(12), torch.zeros(1, 12)]), None, "got length 0 in row 12"),
        (torch.eye(12).fill_diagonal_(math.nan), None, "got length nan in row 0"),
        (torch.eye(12).index_fill(0, torch.tensor([3]), math.inf), None, "got length inf in row 3"),
        (torch.eye(12), ["a", "b"], "12 `class_names`, got 2"),
        (torch.eye(12)[:3], "abc", "3 `class_names`, got 'abc'"),
    ],
)
def test_class_embeddings_are_checked(clip, embeds, names, message):
    for make in (CLIPClassifier.from_clip, export_classifier):
        with pytest.raises(ValueError, match=f"(?s)Expected.*{message}"):
            make(clip, embeds, names)


def test_rows_rounded_to_half_precision_are_of_length_1(clip):
    embeds = embed_classes(clip).bfloat16()
    made = CLIPClassifier.from_clip(clip, embeds)
    torch.testing.assert_close(made.head.weight, 100 * embeds.float(), rtol=1e-6, atol=0)


# Names


def test_names_become_labels_and_duplicates_stay_apart(exported):
    assert exported.config.num_labels == 5
    assert list(exported.config.id2label.values()) == ["cat", "dog", "missile (2)", "tree", "missile (4)"]
    assert {exported.config.label2id[name]: name for name in exported.config.label2id} == exported.config.id2label


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "b", "a", "a"], ["a (0)", "b", "a (2)", "a (3)"]),
        (["a", "a (0)", "a"], ["a (0) (0)", "a (0) (1)", "a (2)"]),
    ],
)
def test_label_names_are_different(names, expected):
    assert label_names(names) == expected


def test_without_names_the_labels_are_numbered(clip):
    config = CLIPClassifier.from_clip(clip, torch.eye(12)).config
    assert config.num_labels == 12
    assert config.id2label[11] == "LABEL_11"
    assert config.label2id["LABEL_11"] == 11


# Saving, loading, pipeline


def test_saving_and_loading_keeps_every_bit(exported, tmp_path):
    exported.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert CLIPClassifier.from_pretrained(tmp_path).config.architectures == ["CLIPClassifier"]
    for load in (CLIPClassifier, AutoModelForImageClassification):
        loaded = load.from_pretrained(tmp_path)
        assert type(loaded) is CLIPClassifier
        assert not loaded.training
        assert states_equal(loaded, exported)
        assert torch.equal(loaded(pixels()).logits, exported(pixels()).logits)
        assert loaded.config.id2label == exported.config.id2label
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CLIPClassifierConfig
    assert config.vision_config.to_dict() == exported.config.vision_config.to_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "clip_classifier"
    assert "text_config" not in written


def test_a_copy_of_the_module_may_register_again(exported, tmp_path, monkeypatch):
    exported.save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location("carot_hf.models.classifier_again", classifier.__file__)
    try:
        again = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, again)
        spec.loader.exec_module(again)
        assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is again.CLIPClassifier
    finally:
        AutoConfig.register("clip_classifier", CLIPClassifierConfig, exist_ok=True)


@pytest.mark.parametrize("whole", [True, False])
def test_the_stock_pipeline_gives_the_softmax_of_the_logits(exported, processor, tmp_path, caplog, whole):
    exported.double().save_pretrained(tmp_path)
    (processor if whole else processor.image_processor).save_pretrained(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (3, 21, 18, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in noise]
    with caplog.at_level(logging.WARNING):
        classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
        found = classify(images, top_k=5)
    assert "not supported" not in caplog.text
    values = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = exported(values).logits.double().softmax(dim=-1)
    for row, ranking in zip(expected, found, strict=True):
        scores = {entry["label"]: entry["score"] for entry in ranking}
        assert list(scores) == [exported.config.id2label[int(index)] for index in row.argsort(descending=True)]
        for index, label in exported.config.id2label.items():
            # the model in float64, the pipeline's softmax of its logits in float32
            assert scores[label] == pytest.approx(float(row[index]), abs=float32_bound(100, operations=1))


# Temperature


@torch.no_grad()
def test_a_baked_temperature_divides_the_logits_once_and_comes_out_again(exported, tmp_path):
    exported.double().head.bias.copy_(torch.linspace(-1, 1, 5))
    before = exported(pixels()).logits
    original = copy.deepcopy(exported)
    bake_temperature(exported, 2.0, record={"split": "validation"})
    assert torch.equal(exported(pixels()).logits, before / 2)  # a power of two is exact
    with pytest.raises(RuntimeError, match="without a baked temperature"):
        bake_temperature(exported, 2.0)
    exported.save_pretrained(tmp_path)
    loaded = CLIPClassifier.from_pretrained(tmp_path)
    assert loaded.config.calibration == {"temperature": 2.0, "split": "validation"}
    assert states_equal(loaded, exported)
    unbake_temperature(loaded)
    assert states_equal(loaded, original)
    assert not hasattr(loaded.config, "calibration")
    bake_temperature(loaded, 1.7)
    torch.testing.assert_close(loaded(pixels()).logits, before / 1.7, rtol=0, atol=EXACT)


def bake_with_a_note(clip, record):
    """Bake a temperature for which the exact old scale has to be written down; return it."""
    for temperature in np.linspace(0.5, 0.8, 50).tolist():
        twin = copy.deepcopy(clip)
        bake_temperature(twin, temperature)
        if "logit_scale_before" in twin.config.calibration:
            bake_temperature(clip, temperature, record=record)
            return temperature
    raise AssertionError("no temperature needs the note")


def test_an_exported_temperature_acts_and_can_be_taken_out(exact, tmp_path):
    clip = exact
    with torch.no_grad():
        clip.logit_scale.fill_(3.9)  # above 4 once baked, where floats are coarser
    embeds, plain = embed_classes(clip), zero_shot(clip)
    record = {"split": "validation", "templates": ["a {}"]}
    temperature = bake_with_a_note(clip, record)
    calibrated = zero_shot(clip)
    assert (calibrated - plain).abs().max() > 0.01
    made = export_classifier(clip, embeds, NAMES)
    assert made.config.calibration == {"temperature": temperature, **record}
    made.config.calibration["templates"].append("b {}")
    assert clip.config.calibration["templates"] == ["a {}"]
    made.save_pretrained(tmp_path)
    loaded = CLIPClassifier.from_pretrained(tmp_path)
    assert loaded.config.calibration == made.config.calibration
    torch.testing.assert_close(probabilities(loaded), calibrated, rtol=0, atol=EXACT)
    with pytest.raises(RuntimeError, match="without a baked temperature"):
        bake_temperature(loaded, 2.0)
    unbake_temperature(loaded)
    torch.testing.assert_close(probabilities(loaded), plain, rtol=0, atol=EXACT)


def test_a_training_starts_without_the_record_but_with_the_scale(exact):
    clip = exact
    embeds = embed_classes(clip)
    bake_temperature(clip, 1.6)
    calibrated = zero_shot(clip)
    made = CLIPClassifier.from_clip(clip, embeds)
    assert not hasattr(made.config, "calibration")
    assert clip.config.calibration == {"temperature": 1.6} | clip.config.calibration
    torch.testing.assert_close(probabilities(made), calibrated, rtol=0, atol=EXACT)
    bake_temperature(made, 2.0)


def test_an_uncalibrated_model_has_no_record(exported):
    assert not hasattr(exported.config, "calibration")


# Linear probe


def sample(rows=240, size=6, classes=4, seed=0):
    """Overlapping classes on the unit sphere, float64, and a head to start from."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    noise = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return F.normalize(centres[labels] + 1.2 * noise, dim=-1), labels, 10 * F.normalize(centres, dim=-1)


def slow_objective(features, labels, weight, bias, l2, label_smoothing):
    """The formula of the docstring, row by row."""
    classes, total = len(weight), 0.5 * l2 * weight.square().sum()
    for feature, label in zip(features, labels, strict=True):
        logits = weight @ feature + bias
        log_probs = logits - torch.logsumexp(logits, dim=0)
        target = torch.full((classes,), label_smoothing / classes, dtype=weight.dtype)
        target[label] += 1 - label_smoothing
        total = total - (target * log_probs).sum()
    return total / len(features)


@pytest.mark.parametrize("l2", [3.0, 0.1, None])
def test_the_probe_finds_what_scikit_learn_finds(l2):
    features, labels, head = sample()
    options = {} if l2 is None else {"l2": l2}
    weight, bias = linear_probe(features, labels, head, torch.zeros(4, dtype=torch.float64), **options)
    theirs = LogisticRegression(C=1 / (0.01 if l2 is None else l2), tol=1e-10, max_iter=10_000)
    theirs.fit(features.numpy(), labels.numpy())
    found = (features @ weight.T + bias).softmax(dim=-1).numpy()
    np.testing.assert_allclose(found, theirs.predict_proba(features.numpy()), rtol=0, atol=1e-4)
    np.testing.assert_allclose(weight - weight.mean(0), theirs.coef_ - theirs.coef_.mean(0), atol=0.02)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_gradient_is_zero_at_the_end(label_smoothing):
    features, labels, head = sample(60)
    fitted = linear_probe(features, labels, head, head[:, 0], l2=0.5, label_smoothing=label_smoothing)
    parameters = [part.clone().requires_grad_() for part in fitted]
    gradients = torch.autograd.grad(slow_objective(features, labels, *parameters, 0.5, label_smoothing), parameters)
    start = [head.clone().requires_grad_(), head[:, 0].clone().requires_grad_()]
    steep = torch.autograd.grad(slow_objective(features, labels, *start, 0.5, label_smoothing), start)
    for gradient, at_start in zip(gradients, steep, strict=True):
        assert gradient.abs().max() < 1e-5
        assert at_start.abs().max() > 1e-2


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_two_points_have_a_closed_form(label_smoothing):
    """Features +1 and -1, weights -a and a: a * l2 / N = 1 - eps/2 - sigmoid(2a), solved for the l2 of a = 1."""
    sigmoid = 1 / (1 + math.exp(-2.0))
    l2 = 4 * (1 - label_smoothing / 2 - sigmoid)
    features, labels = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([1, 0, 1, 0])
    weight, bias = linear_probe(
        features, labels, torch.zeros(2, 1), torch.tensor([0.3, 0.1]), l2=l2, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(weight, torch.tensor([[-1.0], [1.0]]), rtol=0, atol=1e-4)
    torch.testing.assert_close(bias, torch.tensor([0.2, 0.2]), rtol=0, atol=1e-4)  # their sum never moves


def test_the_optimum_does_not_depend_on_start_or_chunks_and_nothing_is_random(monkeypatch):
    features, labels, head = sample()
    start = (head, torch.zeros(4, dtype=torch.float64))
    inputs = [part.clone() for part in (features, labels, *start)]
    one = linear_probe(features, labels, *start, l2=0.5)
    for kept, part in zip(inputs, (features, labels, *start), strict=True):
        assert torch.equal(kept, part)
    assert all(torch.equal(a, b) for a, b in zip(one, linear_probe(features, labels, *start, l2=0.5), strict=True))
    elsewhere = linear_probe(features, labels, -head.flip(0), torch.zeros(4, dtype=torch.float64), l2=0.5)
    largest, log_softmax = [], F.log_softmax
    monkeypatch.setattr(F, "log_softmax", lambda rows, dim: (largest.append(len(rows)), log_softmax(rows, dim))[1])
    monkeypatch.setattr("carot_hf.models.linear_probe._CHUNK_VALUES", 7 * 4 + 1)
    chunked = linear_probe(features, labels, *start, l2=0.5)
    assert max(largest) == 7  # 240 rows leave a chunk of 2
    assert min(largest) == 2
    for other in (elsewhere, chunked):
        for found, expected in zip(other, one, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_the_head_comes_back_as_it_was_given():
    features, labels, head = sample()
    for dtype in (torch.float32, torch.bfloat16):
        weight, bias = linear_probe(features.float(), labels.int(), head.to(dtype), torch.zeros(4, dtype=dtype), l2=1.0)
        assert weight.dtype == bias.dtype == dtype
        assert not weight.requires_grad
    parameter = torch.nn.Linear(6, 4)
    before = copy.deepcopy(parameter)
    linear_probe(features.float().requires_grad_(), labels, parameter.weight, parameter.bias, l2=1.0)
    assert torch.equal(parameter.weight, before.weight)
    assert parameter.weight.grad is None


def test_too_few_steps_are_logged(caplog):
    features, labels, head = sample()
    bias = torch.zeros(4, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="carot_hf.models.linear_probe"):
        short = linear_probe(features, labels, head, bias, max_iter=3)
        assert "not at its optimum after 3 steps" in caplog.text
        caplog.clear()
        long = linear_probe(features, labels, head, bias)
        assert not caplog.records
    losses = [slow_objective(features, labels, *pair, 0.01, 0.0) for pair in ((head, bias), short, long)]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.eye(6)[0]}, r"shape \(N, D\) with N >= 1, got torch.float32 of shape \(6,\)"),
        ({"features": torch.zeros(0, 6)}, r"N >= 1, got .*\(0, 6\)"),
        ({"features": torch.eye(6).long()}, "float dtype.*got torch.int64"),
        ({"features": 3 * torch.eye(6)}, "length 1 in `features`, got length 3 in row 0"),
        ({"features": torch.eye(6).fill_diagonal_(math.nan)}, "got length nan in row 0"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"`labels` of shape \(6,\), got torch.int64 of shape \(5,\)"),
        ({"labels": torch.zeros(6)}, "integer `labels`.*got torch.float32"),
        ({"labels": torch.tensor([0, 1, 2, 0, 1, 3])}, r"in \[0, 3\), got 3 in row 5"),
        ({"labels": torch.tensor([0, -100, 2, 0, 1, 2])}, r"in \[0, 3\), got -100 in row 1"),
        ({"weight": torch.zeros(3, 5)}, r"`weight` of shape \(K, 6\).*got \(3, 5\) and \(3,\)"),
        ({"weight": torch.zeros(1, 6), "bias": torch.zeros(1)}, r"K >= 2.*got \(1, 6\)"),
        ({"bias": torch.zeros(4)}, r"got \(3, 6\) and \(4,\)"),
        ({"weight": torch.full((3, 6), math.nan)}, "finite `weight`"),
        ({"bias": torch.full((3,), math.inf)}, "finite `weight` and `bias`"),
        ({"label_smoothing": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"in \[0, 1\), got -0.1"),
        ({"l2": 0.0}, "`l2` above 0, got 0.0"),
        ({"l2": math.nan}, "finite `l2`.*got nan"),
        ({"max_iter": 0}, "`max_iter` >= 1, got 0"),
    ],
)
def test_arguments_of_the_probe_are_checked(change, message):
    valid = {"features": torch.eye(6), "labels": torch.tensor([0, 1, 2, 0, 1, 2]), "weight": torch.zeros(3, 6)}
    arguments = {**valid, "bias": torch.zeros(3), **change}
    head = [arguments.pop(name) for name in ("features", "labels", "weight", "bias")]
    with pytest.raises(ValueError, match=f"(?s)Expected.*{message}"):
        linear_probe(*head, **arguments)


def test_a_probe_of_the_tiny_model_fits_its_training_set(processor):
    """First stage of LP-FT on the model's own features: better than the zero-shot head, by its own loss."""
    clip = tiny_clip(processor.tokenizer, seed=3).eval()
    made = CLIPClassifier.from_clip(clip, embed_classes(clip))
    labels = torch.arange(40) % 5
    with torch.no_grad():
        features = F.normalize(made.get_image_features(pixels(40)).pooler_output, dim=-1)
        before = made(pixels(40), labels=labels).loss
        weight, bias = linear_probe(features, labels, made.head.weight, made.head.bias, l2=0.1)
        made.head.weight.copy_(weight)
        made.head.bias.copy_(bias)
        assert made(pixels(40), labels=labels).loss < before - 0.1
