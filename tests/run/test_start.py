"""Methods that hold the student to the model it started from: what they compute in training, keep, share and refuse."""

from __future__ import annotations

import copy

import families
import pytest
import reference_start as slow
import torch
from runs import a_caption_each, logged, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerances import EXACT
from toys import CLASSES, TEMPLATES, tiny_clip
from transformers import CLIPModel

from carot_hf import CLIPClassifier
from carot_hf.basics.fingerprint import fingerprint
from carot_hf.basics.manifest import write_manifest
from carot_hf.data.captions import caption_embeddings, fill_template
from carot_hf.models.lora import merged
from carot_hf.run.moved import squared_distance

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

NEW = ("static", "fd", "l2-sp", "dive", "lipsum", "car-ft")
TERM = {
    "static": "distillation",
    "fd": "feature_distillation",
    "l2-sp": "l2_sp",
    "dive": "difference_vectors",
    "lipsum": "energy_gap",
    "car-ft": "context_distillation",
}


def clip(processor):
    return tiny_clip(processor.tokenizer).double()


def unit_rows(features):
    return torch.nn.functional.normalize(features, dim=-1).tolist()


def image_rows(model, batch):
    return unit_rows(model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output)


def text_rows(model, batch):
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    return unit_rows(model.get_text_features(**tokens).pooler_output)


@pytest.fixture(autouse=True)
def adapters(request):
    """Some of the tests are of LoRA, too: without peft these are another environment's."""
    if "lora" in request.node.name.lower() or "adapters" in request.node.name:
        pytest.importorskip("peft")


@pytest.fixture
def trained(make_trainer, processor):
    """Make and train a trainer in float64."""

    def make(preset, **options):
        trainer = make_trainer(clip(processor), preset=preset, **options)
        trainer.train()
        return trainer

    return make


@pytest.mark.parametrize("preset", NEW)
def test_the_term_is_zero_before_the_first_step_and_not_after(trained, preset):
    first, *others = [entry[TERM[preset]] for entry in logged(trained(preset, teacher_update_every=1), TERM[preset])]
    assert first == pytest.approx(0, abs=1e-12)
    assert all(value > 1e-7 for value in others)


@pytest.mark.parametrize("preset", ["l2-sp", "dive", "lipsum", "car-ft"])
def test_the_term_of_a_trained_model_is_that_of_a_slow_loop(trained, processor, preset):
    """The oracle has the start model out of the seed, the images and captions of a batch, and nothing of ours."""
    trainer, start = trained(preset), clip(processor).eval()
    model = trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        found = trainer.loss_terms(model, batch)[0][TERM[preset]].item()
        rows = a_caption_each(batch)
        if preset == "l2-sp":
            weights, then = (
                {name: value.tolist() for name, value in network.named_parameters()} for network in (model, start)
            )
            expected = slow.squared_distance(weights, then)
        elif preset == "dive":
            mean = trainer._companions.start.mean.tolist()
            expected = slow.difference_vectors(
                image_rows(model, rows), text_rows(model, rows), image_rows(start, rows), text_rows(start, rows), mean
            )
        else:
            now = image_rows(model, rows)
            scale = start.logit_scale.item()
            if preset == "lipsum":
                tokens = trainer.captions.random(80, 8, (trainer.args.order_seed, trainer._step._number))
                expected = slow.energy_gap(now, image_rows(start, rows), text_rows(start, tokens), scale)
            else:
                captions = [
                    text_rows(start, processor.tokenizer([fill_template(t, c) for t in TEMPLATES], return_tensors="pt",
                                                         padding=True))
                    for c in CLASSES
                ]  # fmt: skip
                expected = slow.context_distillation(now, image_rows(start, rows), slow.contexts(captions), scale)
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_mean_of_the_moves_is_that_of_the_batches_one_after_the_other(make_trainer, processor):
    """By hand: the mean over images and texts of each batch, after its step's loss, before its update."""
    trainer = make_trainer(clip(processor), preset="dive", max_steps=3)
    start, mean = clip(processor).eval(), torch.zeros(12, dtype=torch.float64)
    means = []
    before = trainer._step.terms

    def watch(model, inputs):
        nonlocal mean
        means.append((trainer._companions.start.mean, mean))
        terms = before(model, inputs)
        with torch.no_grad():
            rows = a_caption_each(inputs)
            moves = []
            for side in (image_rows, text_rows):
                now, then = (torch.tensor(side(network, rows), dtype=torch.float64) for network in (model, start))
                moves.append(now - then)
            mean = 0.99 * mean + 0.01 * torch.cat(moves).mean(dim=0)
        return terms

    trainer._step.terms = watch
    trainer._hp_search_setup = lambda trial: None  # which would make the step anew
    trainer.train()
    assert len(means) == 3
    assert trainer._companions.start.mean.tolist() == pytest.approx(mean.tolist(), abs=1e-12)
    assert mean.abs().max() > 1e-5


@pytest.mark.parametrize("preset", ["l2-sp", "dive", "static", "fd"])
@pytest.mark.parametrize("lora", [0, 4], ids=["whole", "LoRA"])
def test_a_gradient_cache_is_one_large_batch(make_trainer, processor, tmp_path, preset, lora):
    options = {"preset": preset, "max_steps": 3, "lora_rank": lora, "optim": "sgd"}  # Adam divides rounding by itself
    whole = make_trainer(clip(processor), per_device_train_batch_size=12, output_dir=str(tmp_path / "a"), **options)
    cached = make_trainer(
        clip(processor),
        per_device_train_batch_size=4,
        contrastive_batch_size=12,
        output_dir=str(tmp_path / "b"),
        **options,
    )
    for trainer in (whole, cached):
        trainer.train()
    for name, value in merged(whole.model).state_dict().items():
        torch.testing.assert_close(merged(cached.model).state_dict()[name], value, atol=EXACT, rtol=EXACT)
    one, two = (trainer._companions.start for trainer in (whole, cached))
    if preset == "dive":
        assert one.mean.tolist() == pytest.approx(two.mean.tolist(), abs=EXACT)
    for a, b in zip(logged(whole, TERM[preset]), logged(cached, TERM[preset]), strict=True):
        assert a[TERM[preset]] == pytest.approx(b[TERM[preset]], abs=EXACT)


@pytest.mark.parametrize(
    ("preset", "options"),
    [*((name, {}) for name in NEW), ("l2-sp", {"lora_rank": 4}), ("dive", {"lora_rank": 4})],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_resumed_equals_unbroken(make_trainer, tmp_path, preset, options):
    """Bit for bit, the mean of the moves and the random texts included."""
    settings = {"preset": preset, "gradient_accumulation_steps": 1, "max_steps": 5, "label_smoothing_factor": 0.0}
    whole = run(make_trainer, tmp_path / "whole", **settings, **options)
    again = run(
        make_trainer, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"), **settings, **options
    )
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    for a, b in zip(logged(whole, TERM[preset])[-2:], logged(again, TERM[preset])[-2:], strict=True):
        assert a[TERM[preset]] == b[TERM[preset]]
    if preset == "dive":
        assert torch.equal(whole._companions.start.mean, again._companions.start.mean)
    if whole.teacher is not None:
        for name, value in whole.teacher.state_dict().items():
            assert torch.equal(value, again.teacher.state_dict()[name]), name


# ---- one copy, kept as a name and a checksum ----


def test_a_teacher_that_never_moves_is_the_start_model_and_is_not_written(make_trainer, tmp_path, processor):
    trainer = run(
        make_trainer, tmp_path / "run", preset="static", difference_vector_weight=1.0, gradient_accumulation_steps=1,
        max_steps=2, label_smoothing_factor=0.0,
    )  # fmt: skip
    start = trainer._companions.start
    assert start.network is trainer.teacher.model
    assert trainer._step._start._taught is trainer._step._taught  # asked once a batch for both
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / "teacher.safetensors").exists()
    with safe_open(checkpoint / "start.safetensors", "pt") as file:
        said = file.metadata()
        assert set(file.keys()) == {"difference_mean"}
    assert said["hash"] == start.checksum == fingerprint(tiny_clip(processor.tokenizer).requires_grad_(False).eval())
    assert (checkpoint / "start.safetensors").stat().st_size < 1000


def test_a_moving_teacher_and_a_start_model_are_two(make_trainer, tmp_path):
    trainer = run(
        make_trainer, tmp_path / "run", preset="carot", l2_sp_weight=0.1, gradient_accumulation_steps=1, max_steps=2,
        label_smoothing_factor=0.0,
    )  # fmt: skip
    assert trainer._companions.start.network is not trainer.teacher.model
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "teacher.safetensors").exists()
    assert (checkpoint / "start.safetensors").exists()
    weights = load_file(checkpoint / "teacher.safetensors")
    assert any(not torch.equal(value, trainer._companions.start.network.state_dict()[name])
               for name, value in weights.items())  # fmt: skip


def test_with_lora_the_start_model_shares_what_is_frozen(make_trainer):
    trainer = make_trainer(preset="dive", lora_rank=4)
    own, theirs = (dict(model.named_parameters()) for model in (trainer._companions.start.network, trainer.model))
    assert sum(own[name] is theirs[name] for name in own) > 20
    assert all(own[name] is not theirs[name] for name in own if "lora_" in name)


def test_a_resume_from_another_start_model_is_refused_and_nothing_is_loaded(make_trainer, tmp_path, processor):
    options = {"preset": "l2-sp", "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    make_trainer(**options).train()
    other, fresh = (tiny_clip(processor.tokenizer, seed=1) for _ in range(2))
    trainer = make_trainer(other, **{**options, "output_dir": str(tmp_path / "again")})
    with pytest.raises(ValueError, match=r"start\.safetensors is of a run that started from another model; make the "):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("mean", "said"),
    [(torch.zeros(5), r"of shape \(5,\) in place of \(12,\)"), (None, "1 of 1 tensors"),
     (torch.full((12,), torch.nan), "nan or inf"), (torch.zeros(12).double(), "in torch.float64 in place of")],
    ids=["size", "missing", "nan", "dtype"],
)  # fmt: skip
def test_a_mean_that_is_none_is_refused_and_does_not_begin_anew_in_silence(make_trainer, tmp_path, mean, said):
    options = {"preset": "dive", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = make_trainer(**options)
    trainer.train()
    path = tmp_path / "run" / "checkpoint-1" / "start.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({} if mean is None else {"difference_mean": mean}, path, metadata)
    write_manifest(path.parent)
    again = make_trainer(**{**options, "output_dir": str(tmp_path / "again")})
    with pytest.raises(ValueError, match=rf"start\.safetensors .*{said}"):
        again.train(resume_from_checkpoint=str(path.parent))


def test_a_checkpoint_says_no_place_of_the_machine(make_trainer, tmp_path, processor):
    """They can be pushed while a run trains."""
    tiny_clip(processor.tokenizer).save_pretrained(tmp_path / "home" / "alice" / "clip")
    model = CLIPModel.from_pretrained(tmp_path / "home" / "alice" / "clip")
    make_trainer(model, preset="l2-sp", save_strategy="steps", save_steps=1, max_steps=1).train()
    with safe_open(tmp_path / "run" / "checkpoint-1" / "start.safetensors", "pt") as file:
        assert file.metadata()["model"] == ".../clip"


def test_a_frozen_teacher_that_an_older_version_wrote_by_value_is_read(make_trainer, tmp_path):
    options = {"preset": "static", "gradient_accumulation_steps": 1, "max_steps": 3, "label_smoothing_factor": 0.0}
    whole = run(make_trainer, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    (checkpoint / "start.safetensors").unlink()
    save_file(
        {name: value.clone() for name, value in whole.teacher.state_dict().items()}, checkpoint / "teacher.safetensors"
    )
    write_manifest(checkpoint)
    again = run(make_trainer, tmp_path / "again", resume=str(checkpoint), **options)
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in whole.model.state_dict().items())


# ---- the weights' distance ----


def test_the_distance_of_adapters_is_that_of_their_products(make_trainer, processor):
    trainer = make_trainer(clip(processor), preset="l2-sp", lora_rank=3)
    start = trainer._companions.start.network
    generator = torch.Generator().manual_seed(0)
    for network in (trainer.model, start):  # of a start with adapters of its own, too
        for name, value in network.named_parameters():
            if "lora_" in name:
                value.data = torch.randn(value.shape, generator=generator, dtype=value.dtype)
    found = squared_distance(trainer.model, start)
    whole, then = merged(trainer.model).state_dict(), merged(copy.deepcopy(start)).state_dict()
    assert found.item() == pytest.approx(
        sum((whole[name] - then[name]).square().sum().item() for name in whole), rel=1e-9
    )
    found.backward()
    assert all(value.grad is not None for name, value in trainer.model.named_parameters() if "lora_" in name)


# ---- random texts ----


def test_random_texts_are_others_each_step_and_the_same_again(make_trainer, processor):
    captions = make_trainer(preset="lipsum").captions
    one, again, other = (captions.random(80, 8, (42, step))["input_ids"] for step in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.shape == (80, 10)
    tokenizer = processor.tokenizer
    assert set(one[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert set(one[:, -1].tolist()) == {tokenizer.eos_token_id}
    assert not set(one[:, 1:-1].flatten().tolist()) & set(tokenizer.all_special_ids)
    assert len(one[:, 1:-1].unique()) > 0.5 * min(len(tokenizer), 640)


def test_texts_of_a_classifiers_start_model_are_embedded_by_the_clip_it_was_made_of(make_trainer, processor):
    model = tiny_clip(processor.tokenizer)
    trainer = make_trainer(model, preset="car-ft")
    assert isinstance(trainer.model, CLIPClassifier)
    assert isinstance(trainer._companions.start.network, CLIPModel)
    assert trainer._companions.start.network is not model
    whole = caption_embeddings(model, trainer.captions)
    assert whole.shape == (len(CLASSES) * len(TEMPLATES), 12)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "ft", "l2_sp_weight": 0.1}, "`l2_sp_weight` 0 with the objective 'cross_entropy', got 0.1"),
        ({"preset": "ft", "difference_vector_weight": 1.0}, "`difference_vector_weight` 0 with the objective"),
        ({"preset": "flyp", "energy_gap_weight": -1.0}, "`energy_gap_weight` >= 0 and finite, got -1"),
        ({"preset": "flyp", "l2_sp_weight": float("nan")}, "`l2_sp_weight` >= 0 and finite, got nan"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_a_model_is_looked_at(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(object(), **options)


@pytest.mark.parametrize("preset", ["lipsum", "car-ft"])
def test_a_classifier_has_no_texts(make_trainer, preset):
    classifier = make_trainer(preset="ft").model
    with pytest.raises(ValueError, match=r"Expected a CLIPModel to start from with .*, got CLIPClassifier"):
        make_trainer(classifier, preset=preset)


def test_one_template_is_no_context(make_trainer, suite):
    suite.templates[:] = suite.templates[:1]
    with pytest.raises(ValueError, match="Expected two templates or more for `context_distillation_weight`, got 1"):
        make_trainer(preset="car-ft", suite=suite)


@pytest.mark.parametrize("family", ["metaclip_2", "chinese_clip", "siglip"])
def test_other_families_have_them_with_pairs_or_are_refused(make_trainer, family):
    """Their weights beside the contrastive loss, where a preset has cross-entropy, which is CLIP's only."""
    processor = families.processor_of(family)
    made = {"processing_class": processor, "preset": "flyp"}
    model = families.model_of(family, processor.tokenizer)
    if family == "siglip":
        with pytest.raises(ValueError, match=r"text tower of CLIP's kind.*all of which it reads"):
            make_trainer(model, energy_gap_weight=1.0, **made)
        model = families.model_of(family, processor.tokenizer)
        weights = {"difference_vector_weight": 1.0, "l2_sp_weight": 0.1, "context_distillation_weight": 1.0}
    else:
        weights = {"energy_gap_weight": 1.0, "context_distillation_weight": 1.0}
    trainer = make_trainer(model, max_steps=2, **weights, **made)
    trainer.train()
    names = [name.removesuffix("_weight").replace("difference_vector", "difference_vectors") for name in weights]
    assert all(logged(trainer, name)[-1][name] > 0 for name in names)


def test_two_equal_runs_are_equal(trained):
    """A run is a function of its seed: nothing of the start model is drawn from global generators."""
    one = trained("lipsum")
    torch.rand(3)
    two = trained("lipsum")
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name
