"""CLIP's relatives: trained, judged, calibrated, saved and used in the stock pipeline, through the same interface."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import CONTEXT, FAMILIES, SIGMOID, model_of, processor_of
from safetensors.torch import load_file
from tolerances import EXACT, float32_bound
from toys import CLASSES, TEMPLATES, tiny_clip, tiny_processor
from transformers import AutoModel, AutoProcessor, ViTConfig, ViTModel, pipeline

from carot_hf import bake_temperature, interpolate, unbake_temperature
from carot_hf.cli import training
from carot_hf.data.captions import CaptionTable, class_embeddings
from carot_hf.models.backbones import (
    BACKBONES,
    backbone_of,
    caption_options,
    embedding_size,
    fit_image_size,
    pair_inputs,
)
from carot_hf.models.prepare import captions_of
from carot_hf.objective.losses import similarity_logits


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def trainer_of(make_trainer):
    def make(family, **options):
        processor = processor_of(family)
        model = model_of(family, processor.tokenizer, seed=options.pop("model_seed", 0))
        model.to(options.pop("dtype", torch.float32))
        return make_trainer(model, processing_class=processor, **options)

    return make


def stock_logits(model, processor, image, captions):
    """What transformers makes of an image and some captions, as the pipeline calls it."""
    options = {"padding": True}
    if "siglip" in model.config.model_type:
        options = {"padding": "max_length", "max_length": 64, "truncation": True}
    inputs = {
        **processor.image_processor(images=[image], return_tensors="pt"),
        **processor.tokenizer(captions, return_tensors="pt", **options),
    }
    with torch.no_grad():
        return model(**inputs).logits_per_image[0]


def test_each_family_trains_with_its_own_loss_and_follows_its_teacher(trainer_of, family):
    trainer = trainer_of(family, max_steps=6, learning_rate=3e-3, teacher_update_every=2)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    missing = [name for name, value in trainer.model.named_parameters() if torch.equal(value, before[name])]
    assert not [name for name in missing if "key" not in name and "k_proj.bias" not in name], missing
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("sigmoid", "sigmoid_distillation") if family in SIGMOID else ("contrastive", "distillation")
    assert all(entry["loss"] == pytest.approx(entry[names[0]] + 0.75 * entry[names[1]], abs=2e-4) for entry in logs)
    assert logs[0][names[1]] == pytest.approx(0, abs=1e-6)
    assert logs[-1][names[1]] > 1e-6
    assert ("logit_bias" in logs[-1]) == (family in SIGMOID)
    moved = dict(trainer.teacher.model.named_parameters())["logit_scale"]
    assert not torch.equal(moved, before["logit_scale"])


def test_the_loss_of_a_batch_is_the_one_transformers_computes(trainer_of, family):
    """`return_loss` of the model itself, on the batch that the trainer sees; SigLIP's is its sigmoid loss."""
    name = "sigmoid" if family in SIGMOID else "contrastive"
    trainer = trainer_of(family, preset="flyp", dtype=torch.float64)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.eval()
    with torch.no_grad():
        terms, _ = trainer.loss_terms(trainer.model, batch)
        theirs = trainer.model(**pair_inputs(batch), return_loss=True).loss
    assert terms[name].item() == pytest.approx(theirs.item(), rel=EXACT)


def test_evaluation_is_what_the_stock_model_says(trainer_of, family):
    """Accuracy and mean confidence against a loop over single images through transformers' own processor and model."""
    trainer = trainer_of(family)
    trainer.suite.templates[:] = TEMPLATES[:1]
    trainer.captions = captions_of(trainer.model, trainer.suite, trainer.processing_class)
    metrics = trainer.evaluate()
    captions = [TEMPLATES[0].replace("{}", name) for name in CLASSES]
    data = trainer.suite.test
    hits, confidences, nll = [], [], []
    for index in range(len(data)):
        item = data[index]
        logits = stock_logits(trainer.model, trainer.processing_class, item["image"], captions).double()
        answers = logits.sigmoid() if family in SIGMOID else logits.softmax(0)
        hits.append(int(logits.argmax()) == item["label"])
        confidences.append(float(answers.max()))
        one_hot = F.one_hot(torch.tensor(item["label"]), len(CLASSES)).double()
        nll.append(
            float(F.binary_cross_entropy(answers, one_hot, reduction="sum"))
            if family in SIGMOID
            else -math.log(answers[item["label"]])
        )
    n = len(data)
    bound = float32_bound(trainer.model.logit_scale.exp().item(), 12)
    assert metrics["eval_home_accuracy"] == pytest.approx(sum(hits) / n)
    assert metrics["eval_home_overconfidence"] == pytest.approx((sum(confidences) - sum(hits)) / n, abs=bound)
    assert metrics["eval_home_nll"] == pytest.approx(sum(nll) / n, abs=len(CLASSES) * bound)
    assert ("eval_bias" in metrics) == (family in SIGMOID)


def test_a_calibrated_model_is_calibrated_in_the_stock_pipeline(trainer_of, family):
    trainer = trainer_of(family, max_steps=3, learning_rate=3e-3)
    trainer.train()
    evaluated = trainer.evaluate()
    image = trainer.suite.test[3]["image"]
    captions = [TEMPLATES[1].replace("{}", name) for name in CLASSES]
    logits = stock_logits(trainer.model, trainer.processing_class, image, captions).double()
    record = trainer.calibrate()
    trainer.save_model()
    again = trainer.evaluate()
    bound = float32_bound(trainer.model.logit_scale.exp().item(), 12)
    assert again["eval_home_ece"] == pytest.approx(evaluated["eval_home_ece_ts"], abs=bound)
    assert again["eval_home_accuracy"] == evaluated["eval_home_accuracy"]
    scaled = logits / record["temperature"]
    expected = (scaled + record["bias"]).sigmoid() if family in SIGMOID else scaled.softmax(0)
    folder = trainer.args.output_dir
    classify = pipeline("zero-shot-image-classification", model=folder)
    scores = classify(image, candidate_labels=CLASSES, hypothesis_template=TEMPLATES[1])
    found = {row["label"]: row["score"] for row in scores}
    assert [found[name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=bound)
    assert json.loads(Path(folder, "config.json").read_text())["calibration"] == record


def test_a_saved_model_loads_and_its_temperature_comes_out_again(trainer_of, family):
    trainer = trainer_of(family)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.calibrate()
    trainer.save_model()
    loaded = AutoModel.from_pretrained(trainer.args.output_dir)
    assert backbone_of(loaded) is BACKBONES[family]
    assert AutoProcessor.from_pretrained(trainer.args.output_dir).tokenizer.model_input_names
    unbake_temperature(loaded)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("whole", [2, 6])
def test_the_gradient_cache_trains_as_the_large_batch_does(trainer_of, family, whole):
    """One step of 12 pairs at once, and of 12 pairs, some at a time: the same weights."""
    results = []
    for batch, cache in ((12, 0), (whole, 12)):
        trainer = trainer_of(
            family, per_device_train_batch_size=batch, contrastive_batch_size=cache, max_steps=2, optim="sgd",
            teacher_update_every=1, dtype=torch.float64,
        )  # fmt: skip
        trainer.train()
        results.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    bound = float32_bound() if family == "siglip2" else EXACT  # transformers resizes its positions in float32
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=bound, msg=name)


def test_resumed_equals_unbroken(trainer_of, family, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "teacher_update_every": 1}
    whole = trainer_of(family, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = trainer_of(family, output_dir=str(tmp_path / "whole"), model_seed=1, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for network, other in ((whole.model, resumed.model), (whole.teacher.model, resumed.teacher.model)):
        for name, value in network.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert "logit_scale" in load_file(tmp_path / "whole" / "checkpoint-5" / "teacher.safetensors")


def test_the_best_checkpoint_is_loaded_whole(trainer_of, family):
    """AltCLIP's files carry other names than the model; Trainer alone would keep the last weights, with a warning."""
    trainer = trainer_of(
        family, max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_validation_nll",
    )  # fmt: skip
    trainer.train()
    best = AutoModel.from_pretrained(trainer.state.best_model_checkpoint)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, best.state_dict()[name]), name


def test_captions_are_embedded_as_the_padded_ones_are(family):
    """Trimmed to the batch where the tower allows it; SigLIP's reads the padding and gets all of it."""
    processor = processor_of(family)
    model = model_of(family, processor.tokenizer).double()
    options = caption_options(model.config, processor.tokenizer)
    assert options["max_length"] == CONTEXT[family]
    table = CaptionTable(processor, CLASSES, TEMPLATES, **options)
    ours = class_embeddings(model, table)
    texts = [template.replace("{}", name) for name in CLASSES for template in TEMPLATES]
    tokens = processor.tokenizer(texts, padding="max_length", max_length=CONTEXT[family], return_tensors="pt")
    with torch.no_grad():
        features = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    expected = F.normalize(features.view(len(CLASSES), len(TEMPLATES), -1).mean(1), dim=-1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=EXACT)
    short = table.lookup(torch.tensor([0]), torch.tensor([1]))
    assert (short["input_ids"].shape[1] == CONTEXT[family]) == (family in SIGMOID)
    assert ("attention_mask" in short) == (family not in ("siglip", "metaclip_2")), "what sees no padding needs no mask"
    assert embedding_size(model) == ours.shape[1]


@pytest.mark.parametrize(
    ("family", "preset"),
    [*((family, "ft") for family in FAMILIES), *((family, "carot-2024") for family in SIGMOID), ("siglip", "tracer")],
)
def test_what_is_not_supported_is_refused_with_the_table(trainer_of, family, preset):
    with pytest.raises(ValueError, match=r"see docs/backbones.md"):
        trainer_of(family, preset=preset)


def test_lora_is_clips_only(trainer_of, family):
    with pytest.raises(ValueError, match=r"Expected a CLIPModel for `lora_rank` 2.*see docs/backbones.md"):
        trainer_of(family, lora_rank=2)


def test_a_classifier_is_clips_only(trainer_of, family):
    with pytest.raises(TypeError, match=r"Expected a CLIPModel to export.*see docs/backbones.md"):
        trainer_of(family).export_classifier()


def test_other_models_are_refused_with_the_table(make_trainer, processor):
    vit = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(TypeError, match=r"CLIPModel, MetaClip2Model.*got ViTModel.*see docs/backbones.md"):
        make_trainer(vit)


def test_the_scale_of_siglip_is_not_clamped(trainer_of):
    """Its checkpoints have multipliers around 117; CLIP's maximum of 100 would change every logit."""
    trainer = trainer_of("siglip", max_steps=1, learning_rate=1e-5)
    with torch.no_grad():
        trainer.model.logit_scale.fill_(math.log(117.3))
    trainer.train()
    assert trainer.model.logit_scale.exp().item() == pytest.approx(117.3, rel=1e-3)


def test_siglip_ece_criterion_is_refused(trainer_of):
    trainer = trainer_of("siglip", calibration_criterion="ece")
    with pytest.raises(ValueError, match="'nll' for a model with SigLIP's sigmoid"):
        trainer.calibrate()


def test_penalties_reach_the_projections_of_clips_relatives(trainer_of):
    trainer = trainer_of("altclip", preset="carot-2024", max_steps=1)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["orthogonality"] > 0
    assert log["cross_norm"] > 0


@pytest.mark.parametrize("same_class", ["positive", "ignore"])
def test_same_class_pairs_with_a_sigmoid(trainer_of, same_class):
    """Positive: each text of the class is a match. Ignored: those pairs are not there. Against a loop in float64."""
    trainer = trainer_of("siglip", preset="flyp", same_class=same_class, label_smoothing_factor=0.1)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch["labels"] = torch.tensor([0, 1, 0, 2])
    trainer.model.eval()
    with torch.no_grad():
        terms, outputs = trainer.loss_terms(trainer.model, batch)
        head = trainer.model.logit_scale, trainer.model.logit_bias
        logits = similarity_logits(outputs.image_embeds, outputs.text_embeds, *head).double().tolist()
    total = 0.0
    for i in range(4):
        kept = [j for j in range(4) if same_class == "positive" or i == j or batch["labels"][i] != batch["labels"][j]]
        for j in kept:
            match = batch["labels"][i] == batch["labels"][j] if same_class == "positive" else i == j
            target = 0.9 * float(match) + 0.1 / len(kept)
            p = 1 / (1 + math.exp(-logits[i][j]))
            total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    assert terms["sigmoid"].item() == pytest.approx(total / 4, rel=1e-5)


def test_a_merge_of_two_ends_is_its_ends_and_calibrated_anew(trainer_of, family):
    trainer = trainer_of(family, max_steps=2)
    start = model_of(family, trainer.processing_class.tokenizer)
    trainer.train()
    trained = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.calibrate()
    unbake_temperature(trainer.model)
    for alpha, end in ((0.0, start.state_dict()), (1.0, trained)):
        merged = interpolate(start, trainer.model, alpha).state_dict()
        assert all(torch.equal(value, end[name]) for name, value in merged.items())
    half = interpolate(start, trainer.model, 0.5)
    assert getattr(half.config, "calibration", None) is None
    assert trainer_of(family).model.logit_scale.shape == half.logit_scale.shape


@pytest.mark.slow
def test_the_script_fine_tunes_a_folder_of_another_family(tmp_path):
    processor = processor_of("siglip2")
    processor.save_pretrained(tmp_path / "start")
    model_of("siglip2", processor.tokenizer).save_pretrained(tmp_path / "start")
    report = training.main(
        [
            "--suite", "digits", "--model_name_or_path", str(tmp_path / "start"), "--output_dir", str(tmp_path / "out"),
            "--max_steps", "2", "--use_cpu", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true",
        ]
    )  # fmt: skip
    assert report["calibration"]["bias"] == report["metrics"]["eval_bias"]
    card_free = AutoModel.from_pretrained(tmp_path / "out")
    assert card_free.config.calibration["temperature"] == report["calibration"]["temperature"]


# ---- images of another size ----

GROWN = [family for family in (*FAMILIES, "clip") if family != "siglip2"]  # which takes any size as it is


def with_size(family, side):
    """A processor of the family that gives square images of a side."""
    processor = tiny_processor() if family == "clip" else processor_of(family)
    size = {"height": side, "width": side}
    images = processor.image_processor
    images.size = size if family in ("siglip", "chinese_clip") else {"shortest_edge": side}
    if images.size != size:
        images.crop_size = size
    return processor


def small(family, seed=0):
    if family == "clip":
        return tiny_clip(tiny_processor().tokenizer, seed)
    return model_of(family, processor_of(family).tokenizer, seed=seed)


@pytest.mark.parametrize("side", [8, 24, 40])
@pytest.mark.parametrize("family", GROWN)
def test_a_fitted_model_is_the_one_that_interpolates_at_each_call(family, side, tmp_path):
    """Against `interpolate_pos_encoding` of transformers, in float64; then the saved files in stock transformers."""
    processor = with_size(family, side)
    model = small(family).double().eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(3, 3, side, side, generator=generator, dtype=torch.float64),
        **processor.tokenizer(["a photo of one", "two"], padding=True, return_tensors="pt"),
    }
    with torch.no_grad():
        expected = model(**inputs, interpolate_pos_encoding=True).logits_per_image
        assert fit_image_size(model, (side, side)) is model
        torch.testing.assert_close(model(**inputs).logits_per_image, expected, rtol=0, atol=EXACT)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert (type(loaded), loaded.dtype) == (type(model), torch.float64)
        assert loaded.config.vision_config.image_size == side
        torch.testing.assert_close(loaded(**inputs).logits_per_image, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_fitted_model_trains_and_works_in_the_stock_pipeline(make_trainer, family):
    processor, model = with_size(family, 24), small(family)
    cure = r"or fit the model: carot_hf\.models\.backbones\.fit_image_size\(model, 24\)\."
    with pytest.raises(ValueError, match=cure):
        make_trainer(model, processing_class=processor)
    model.vision_model.embeddings.position_embedding.weight.requires_grad_(family == "clip")
    fit_image_size(model, 24)
    positions = model.vision_model.embeddings.position_embedding.weight
    assert positions.requires_grad == (family == "clip")  # as it was
    before = positions.detach().clone()
    trainer = make_trainer(model, processing_class=processor, max_steps=2)
    trainer.train()
    assert torch.equal(trainer.model.vision_model.embeddings.position_embedding.weight, before) == (family != "clip")
    trainer.calibrate()
    trainer.save_model()
    image = trainer.suite.test[3]["image"]
    captions = [TEMPLATES[0].replace("{}", name) for name in CLASSES]
    logits = stock_logits(trainer.model, processor, image, captions).double()
    expected = logits.sigmoid() if family in SIGMOID else logits.softmax(0)
    classify = pipeline("zero-shot-image-classification", model=trainer.args.output_dir)
    scores = classify(image, candidate_labels=CLASSES, hypothesis_template=TEMPLATES[0])
    found = {row["label"]: row["score"] for row in scores}
    bound = float32_bound(trainer.model.logit_scale.exp().item(), 12)
    assert [found[name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=bound)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((24, 16), "a square size, got 24 x 16"),
        (20, r"whole patches of 8 x 8 pixels, got 20\. Take 16: pixels beyond"),
        (21, r"got 21\. Take 24:"),
        (0, r"got 0\. Take 8:"),
    ],
)
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_size_that_does_not_fit_is_refused(family, size, message):
    model = small(family)
    with pytest.raises(ValueError, match=message):
        fit_image_size(model, size)
    assert model.config.vision_config.image_size == 16


def test_the_cure_is_named_only_where_it_is_one(make_trainer):
    processor = with_size("clip", 20)
    with pytest.raises(
        ValueError, match=r"16 x 16 pixels, .* gives 20 x 20\. .*, or set its `size` and `crop_size`\.$"
    ):
        make_trainer(small("clip"), processing_class=processor)


def test_a_size_is_not_fitted_to_what_has_none_or_is_calibrated():
    with pytest.raises(TypeError, match="got Siglip2Model, which takes any"):
        fit_image_size(small("siglip2"), 24)
    with pytest.raises(TypeError, match=r"CLIPModel, MetaClip2Model.*got Linear"):
        fit_image_size(torch.nn.Linear(2, 2), 24)
    model = small("clip")
    bake_temperature(model, 2.0)
    with pytest.raises(ValueError, match=r"fitted at 16 pixels\. Call carot_hf\.unbake_temperature"):
        fit_image_size(model, 24)
    unbake_temperature(model)
    assert fit_image_size(model, 24).config.vision_config.image_size == 24


def test_the_same_size_changes_nothing():
    model = small("clip")
    before = model.vision_model.embeddings.position_embedding
    assert fit_image_size(model, 16).vision_model.embeddings.position_embedding is before
