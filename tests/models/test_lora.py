"""LoRA: adapters alone are trained and averaged, the rest is shared; what is saved is merged, checkpoints go on."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pushes
import pytest
import torch
from hub_server import Hub
from launching import launch
from peft import IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model
from runs import Net, assert_equal_runs, assert_same, first_batch, losses, run
from safetensors.torch import load_file
from tolerances import EXACT, LOGGED, float32_bound
from torch import nn
from toys import ROOT, SUPPORT, tiny_clip
from transformers import CLIPModel, TrainerCallback, pipeline

from carot_hf import CaRotTrainer, CaRotTrainingArguments, Teacher, interpolate, uniform_soup
from carot_hf.basics.manifest import write_manifest
from carot_hf.models.lora import LINEAR_LAYERS, merged

# peft asks transformers for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RANK = {"lora_rank": 4}
LINEAR = list(LINEAR_LAYERS)
CONFIGS = {
    "plain": LoraConfig(r=4, target_modules=LINEAR),
    "dropout": LoraConfig(r=4, target_modules=LINEAR, lora_dropout=0.2),
    "rslora": LoraConfig(r=4, target_modules=LINEAR, use_rslora=True),
    "dora": LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
    "biases": LoraConfig(r=4, target_modules=LINEAR, bias="lora_only"),
    "one tower": LoraConfig(r=2, target_modules=r"vision_model.*\.(q|v)_proj"),
    "a projection": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["visual_projection"]),
}


def adapted(processor, config="plain"):
    torch.manual_seed(7)
    return get_peft_model(tiny_clip(processor.tokenizer), copy.deepcopy(CONFIGS[config]))


@torch.no_grad()
def embeds(model, batch):
    model.eval()
    output = model(**batch)
    return torch.stack([output.image_embeds, output.text_embeds])


def frozen(model):
    return {name: value for name, value in model.named_parameters() if not value.requires_grad}


def trained(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


class Snapshots(TrainerCallback):
    """What is trained, in float64: at the start, and after each step."""

    def __init__(self):
        self.taken = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.taken.append({name: value.detach().double().clone() for name, value in trained(model).items()})

    def on_step_end(self, args, state, control, model, **kwargs):
        self.on_train_begin(args, state, control, model)


# ---- the start ----


def test_fresh_adapters_change_no_embedding_and_sit_on_the_linear_layers_of_both_towers(make_trainer, processor):
    base = tiny_clip(processor.tokenizer)
    trainer = make_trainer(model=copy.deepcopy(base), **RANK)
    batch = first_batch(trainer)
    assert torch.equal(embeds(trainer.model, batch), embeds(base, batch))
    layers = {name for name, module in base.named_modules() if isinstance(module, nn.Linear) and "_model." in name}
    assert len(layers) == 2 * 2 * 6
    found = {name.split("base_model.model.")[1].split(".lora_")[0] for name in trained(trainer.model)}
    assert found == layers
    assert not trainer.model.logit_scale.requires_grad
    shapes = {tuple(value.shape) for name, value in trained(trainer.model).items() if "lora_A" in name}
    assert shapes == {(4, 16), (4, 32)}


def test_the_adapters_follow_from_the_seed_and_leave_the_generator_alone(make_trainer):
    values = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(noise)
        trainer = make_trainer(seed=seed, **RANK)
        values.append(torch.cat([value.flatten() for value in trained(trainer.model).values()]))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (2, 0.5)])
def test_merged_weights_are_the_closed_form(make_trainer, processor, alpha, scale):
    trainer = make_trainer(tiny_clip(processor.tokenizer).double(), lora_alpha=alpha, **RANK)
    trainer.train()
    whole = merged(trainer.model).vision_model.encoder.layers[1].mlp.fc2.weight
    layer = trainer.model.vision_model.encoder.layers[1].mlp.fc2
    a, b = (part.default.weight.detach().double().clone() for part in (layer.lora_A, layer.lora_B))
    expected = layer.base_layer.weight.double() + scale * b @ a
    torch.testing.assert_close(whole, expected, atol=EXACT, rtol=0)
    assert (whole - layer.base_layer.weight).abs().max() > 1e-4


def test_only_adapters_get_gradients(make_trainer):
    trainer = make_trainer(**RANK)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model.train(), inputs).backward()
    for name, value in trainer.model.named_parameters():
        assert (value.grad is not None) == ("lora_" in name), name
    assert all(value.grad.abs().max() > 0 for name, value in trained(trainer.model).items() if "lora_B" in name)
    assert all(value.grad is None for value in trainer.teacher.model.parameters())


# ---- training, teacher, merge, for each kind of LoRA ----


@pytest.mark.parametrize("config", CONFIGS)
def test_teacher_averages_what_is_trained_and_the_saved_model_is_merged(make_trainer, processor, config, tmp_path):
    model = adapted(processor, config).double()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    seen = Snapshots()
    weights = {"orthogonality_weight": 0.1, "cross_norm_weight": 0.1} if config == "a projection" else {}
    trainer = make_trainer(
        model=model, max_steps=6, teacher_update_every=1, trainer={"callbacks": [seen]}, gradient_accumulation_steps=2,
        same_class="ignore", **weights,
    )  # fmt: skip
    storage = {name: value.data_ptr() for name, value in frozen(model).items()}
    trainer.train()
    assert not any(torch.equal(value, start[name]) for name, value in trained(model).items())
    # the slow loop
    momenta = [0.05 + 0.85 * step / 1.2 if step < 1.2 else 0.9 for step in range(1, 7)]
    average = seen.taken[0]
    for momentum, snapshot in zip(momenta, seen.taken[1:], strict=True):
        average = {name: momentum * value + (1 - momentum) * snapshot[name] for name, value in average.items()}
    teacher = dict(trainer.teacher.model.named_parameters())
    assert trained(model).keys() == average.keys()
    for name, value in average.items():
        torch.testing.assert_close(teacher[name], value, atol=EXACT, rtol=0)
    # the frozen ones: as they were, in one place
    for name, value in frozen(model).items():
        assert torch.equal(value, start[name]), name
        assert value.data_ptr() == storage[name]
        assert torch.equal(teacher[name], value), name
        assert (teacher[name] is value) == (value.dim() > 0), name
    # merged
    trainer.save_model(str(tmp_path / "student"))
    trainer.save_teacher(tmp_path / "teacher")
    batch = first_batch(trainer)
    plain = tiny_clip(processor.tokenizer)
    for folder, network in (("student", model), ("teacher", trainer.teacher.model)):
        assert not list((tmp_path / folder).glob("*adapter*"))
        loaded = CLIPModel.from_pretrained(tmp_path / folder)
        assert loaded.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(embeds(loaded, batch), embeds(network, batch), atol=EXACT, rtol=0)
    apart = embeds(model, batch) - embeds(trainer.teacher.model, batch)
    assert apart.abs().max() > 1e-4
    if weights:
        logged = [entry["orthogonality"] for entry in trainer.state.log_history if "orthogonality" in entry]
        assert logged[-1] < logged[0]  # it acts


def test_the_teacher_holds_no_second_model(make_trainer):
    """Elements of the tensors that are the teacher's own."""

    def own(trainer):
        students = {value.data_ptr() for value in trainer.model.parameters()}
        return sum(value.numel() for value in trainer.teacher.model.parameters() if value.data_ptr() not in students)

    plain, lora = make_trainer(), make_trainer(**RANK)
    adapters = sum(value.numel() for value in trained(lora.model).values())
    assert own(plain) == sum(value.numel() for value in plain.model.parameters())
    assert own(lora) == adapters + 1  # and the logit scale
    saved = sum(value.numel() for value in lora.teacher.state_dict().values())
    assert saved == adapters + 1


# ---- calibration, pipelines, classifier ----


@pytest.mark.parametrize("own", [False, True], ids=["lora_rank", "PeftModel"])
def test_the_saved_folder_gives_calibrated_probabilities_in_the_stock_pipeline(make_trainer, processor, suite, own):
    one = dataclasses.replace(suite, templates=["This is a photo of {}."])
    options = {"model": adapted(processor)} if own else {"model": tiny_clip(processor.tokenizer), **RANK}
    options["model"].double()
    trainer = make_trainer(suite=one, max_steps=2, **options)
    trainer.train()
    batch, teacher_scale = first_batch(trainer), trainer.teacher.model.logit_scale.item()
    record = trainer.calibrate()
    trainer.save_model()
    folder = trainer.args.output_dir
    ours = torch.tensor(trainer.predict(suite.shifts["far"]).predictions).softmax(dim=-1)
    multiplier = trainer.model.logit_scale.exp().item()
    classify = pipeline("zero-shot-image-classification", model=folder, device="cpu")
    for index in range(4):
        answer = classify(
            suite.shifts["far"][index]["image"],
            candidate_labels=suite.class_names,
            hypothesis_template="This is a photo of {}.",
        )
        theirs = {row["label"]: row["score"] for row in answer}
        for column, name in enumerate(suite.class_names):
            # the model is float64, the pipeline's pixels are float32
            assert theirs[name] == pytest.approx(ours[index, column].item(), abs=float32_bound(multiplier, 12))
    loaded = CLIPModel.from_pretrained(folder)
    assert loaded.config.calibration == record
    assert loaded.logit_scale.item() == pytest.approx(trainer.model.logit_scale.item(), abs=1e-6)
    assert trainer.model.logit_scale.item() != teacher_scale
    assert trainer.teacher.model.logit_scale.item() == teacher_scale  # the temperature is the student's
    classifier = trainer.export_classifier().eval()
    with torch.no_grad():
        theirs = classifier(pixel_values=batch["pixel_values"]).logits
        network = trainer.model.eval()
        features = nn.functional.normalize(network.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
    torch.testing.assert_close(theirs, features @ trainer.evaluator.head()[0].T, atol=EXACT, rtol=0)


def test_an_optimizer_of_the_plain_model_is_refused(make_trainer, model):
    """It holds the frozen weights and no adapter: nothing would be trained."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="got one with 0 that are not the model's and 0 of the"):
        make_trainer(model, trainer={"optimizers": (optimizer, None)}, **RANK)


@pytest.mark.slow
def test_saving_in_the_middle_changes_nothing(make_trainer, tmp_path):
    class Saver(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.trainer.save_model(str(tmp_path / f"at-{state.global_step}"))
            self.trainer.export_classifier()
            self.trainer.save_teacher(tmp_path / "teacher")

    saver = Saver()
    plain = make_trainer(**RANK, max_steps=3)
    saving = make_trainer(**RANK, max_steps=3, trainer={"callbacks": [saver]})
    saver.trainer = saving
    for trainer in (plain, saving):
        trainer.train()
    assert_same(plain, saving, 0.0)
    assert losses(plain) == losses(saving)
    states = [load_file(tmp_path / f"at-{step}" / "model.safetensors") for step in (1, 3)]
    assert not torch.equal(*(state["vision_model.encoder.layers.0.mlp.fc1.weight"] for state in states))
    saving.train()  # and once more, from what it is
    assert isinstance(saving.model, PeftModel)


# ---- equal paths ----


def test_the_gradient_cache_equals_the_large_batch(make_trainer, processor):
    options = {"optim": "sgd", **RANK}
    large, small = (
        make_trainer(tiny_clip(processor.tokenizer).double(), per_device_train_batch_size=batch, **cache, **options)
        for batch, cache in ((12, {}), (4, {"contrastive_batch_size": 12}))
    )
    for trainer in (large, small):
        trainer.train()
    assert large.model.dtype == torch.float64
    assert_same(large, small, EXACT)
    assert losses(small) == pytest.approx(losses(large), rel=LOGGED)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        pytest.param({"activation_checkpointing": True, "contrastive_batch_size": 12}, marks=pytest.mark.slow),
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ],
    ids=["checkpointing", "checkpointing and cache", "compiled"],
)
def test_what_changes_speed_and_memory_only(make_trainer, options):
    cache = {name: value for name, value in options.items() if name == "contrastive_batch_size"}
    plain, other = make_trainer(optim="sgd", **RANK, **cache), make_trainer(optim="sgd", **RANK, **options)
    for trainer in (plain, other):
        trainer.train()
    assert_same(plain, other, 1e-6)
    assert other.state.log_history[0]["grad_norm"] > 0


def test_bf16_autocast_trains_float32_adapters_close_to_float32(make_trainer):
    plain, half = make_trainer(optim="sgd", **RANK), make_trainer(optim="sgd", bf16=True, **RANK)
    for trainer in (plain, half):
        trainer.train()
    assert losses(half) != losses(plain)
    assert losses(half) == pytest.approx(losses(plain), rel=2e-2)
    assert all(value.dtype == torch.float32 for value in half.model.parameters())


@pytest.mark.parametrize("own", [False, True], ids=["lora_rank", "PeftModel"])
def test_a_bfloat16_network_stays_so_under_float32_adapters(make_trainer, processor, own, tmp_path):
    base = tiny_clip(processor.tokenizer).to(torch.bfloat16)
    model = get_peft_model(base, copy.deepcopy(CONFIGS["plain"])) if own else base
    start = {name: value.detach().clone() for name, value in base.named_parameters() if "lora" not in name}
    trainer = make_trainer(model=model, float32_weights=False, **({} if own else RANK))
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert value.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
        if "lora_" not in name:
            short = name.removeprefix("base_model.model.")
            first = start[short] if short in start else start[short.replace(".base_layer", "")]
            assert torch.equal(value, first)
    teacher = dict(trainer.teacher.model.named_parameters())
    assert all(teacher[name] is value for name, value in frozen(trainer.model).items() if value.dim())
    assert all(teacher[name].dtype == torch.float32 for name in trained(trainer.model))
    trainer.save_model(str(tmp_path / "saved"))
    loaded = CLIPModel.from_pretrained(tmp_path / "saved")
    assert loaded.dtype == torch.float32
    batch = first_batch(trainer)
    torch.testing.assert_close(embeds(loaded, batch), embeds(trainer.model, batch).float(), atol=3e-2, rtol=0)
    trainer.calibrate()
    trainer.save_model(str(tmp_path / "calibrated"))
    torch.testing.assert_close(embeds(loaded, batch), embeds(trainer.model, batch), atol=float32_bound(size=12), rtol=0)


def test_half_precision_is_trained_in_float32_by_default(make_trainer, processor):
    for model in (tiny_clip(processor.tokenizer).half(), adapted(processor).half()):
        options = RANK if isinstance(model, CLIPModel) else {}
        trainer = make_trainer(model=model, **options)
        assert all(value.dtype == torch.float32 for value in trainer.model.parameters())
        trainer.train()


@pytest.mark.parametrize(
    ("kind", "step"),
    [pytest.param("lora_rank", 1, marks=pytest.mark.slow), ("lora_rank", 2), ("scale, norm, biases", 5)],
)
def test_resumed_equals_unbroken(make_trainer, processor, tmp_path, kind, step):
    def options():
        if kind == "lora_rank":
            return {"preset": "carot", **RANK}
        model = adapted(processor, "biases")
        for value in (model.logit_scale, model.vision_model.post_layernorm.weight):  # peft saves neither
            value.requires_grad_(True)
        with torch.no_grad():
            model.logit_scale.fill_(4.7)  # above the clamp
        return {"preset": "carot", "model": model}

    whole = run(make_trainer, tmp_path / "whole", **options())
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    resumed = run(make_trainer, tmp_path / "again", resume=str(checkpoint), **options())
    assert_equal_runs(whole, resumed)
    assert torch.equal(whole.teacher.model.logit_scale, resumed.teacher.model.logit_scale)
    assert whole.evaluate()["eval_ood_nll"] == resumed.evaluate()["eval_ood_nll"]
    assert resumed.model.logit_scale.requires_grad == (kind != "lora_rank")
    assert not (checkpoint / "model.safetensors").exists()
    saved = [load_file(checkpoint / f"{name}.safetensors") for name in ("adapter_model", "beside_adapters", "teacher")]
    assert set(saved[1]) >= {"base_model.model.logit_scale"}
    if kind == "lora_rank":  # ordinary adapters to peft
        loaded = PeftModel.from_pretrained(tiny_clip(processor.tokenizer), tmp_path / "whole" / "checkpoint-8")
        batch = first_batch(whole)
        assert torch.equal(embeds(loaded, batch), embeds(whole.model, batch))
    assert len(saved[2]) == len(trained(whole.model)) + (kind == "lora_rank")


def test_a_temperature_of_an_earlier_calibration_does_not_spoil_a_resume(make_trainer, tmp_path):
    """The scale is frozen, and in no adapter file; it must come from the checkpoint all the same."""
    whole = run(make_trainer, tmp_path / "whole", preset="carot", **RANK)
    again = run(make_trainer, tmp_path / "whole", preset="carot", max_steps=4, **RANK, save_strategy="no")
    again.calibrate()
    again.args.max_steps = 8
    del again.seen
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_equal_runs(whole, again)


def test_the_best_model_comes_back_and_can_be_trained_on(make_trainer):
    trainer = make_trainer(
        **RANK, max_steps=6, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, eval_sets="all", teacher_update_every=1, metric_for_best_model="eval_id_accuracy",
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    saved, here = load_file(best / "adapter_model.safetensors"), trained(trainer.model)
    assert len(saved) == len(here)
    for name, value in saved.items():
        assert torch.equal(here[name.replace(".weight", ".default.weight")], value), name
    for name, value in load_file(best / "teacher.safetensors").items():
        assert torch.equal(trainer.teacher.state_dict()[name], value), name
    trainer.train()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    options = {"teacher_update_every": 2, "lora_rank": 4}
    one, two = launch(tmp_path, 1, 8, "carot", options), launch(tmp_path, 2, 4, "carot", options)
    for kind in ("student", "teacher"):
        assert any("lora_B" in name and value.abs().max() > 1e-4 for name, value in one[kind].items())
        for name, value in one[kind].items():
            torch.testing.assert_close(two[kind][name], value, atol=EXACT, rtol=EXACT, msg=f"{kind} {name}")
    for key in ("eval_id_nll", "eval_ood_nll"):
        assert two["metrics"][key] == pytest.approx(one["metrics"][key], abs=1e-9)


def test_models_of_model_init_get_lora_and_share_with_the_teacher(make_trainer, processor, suite):
    args = make_trainer(**RANK).args
    trainer = CaRotTrainer(
        args=args, suite=suite, processing_class=processor, model_init=lambda: tiny_clip(processor.tokenizer)
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is not first  # Trainer makes a new one for each run
    teacher = dict(trainer.teacher.model.named_parameters())
    assert all(teacher[name] is value for name, value in frozen(trainer.model).items() if value.dim())
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in trainer.teacher.state_dict().items())


def test_an_evaluation_leaves_no_mark_that_would_keep_accelerate_from_wrapping(make_trainer, processor):
    """peft hands attributes through: one on the network would hide the need for DDP."""
    base = tiny_clip(processor.tokenizer)
    trainer = make_trainer(model=base)
    trainer.evaluate()
    trainer.predict(trainer.suite.test)
    assert not getattr(base, "_is_accelerate_prepared", False)
    assert trainer.accelerator._models == []


# ---- the teacher on its own ----


def test_a_sharing_teacher_follows_a_student_that_moves_or_is_another(monkeypatch):
    net = Net()
    teacher = Teacher(net, share_frozen=True)
    assert teacher.shared == {"frozen.weight", "frozen.bias"}
    assert teacher.model.frozen.weight is net.frozen.weight
    net.double()  # in place, as `to(device)` is
    assert teacher.model.frozen.weight is net.frozen.weight
    assert net.frozen.weight.dtype == torch.float64
    assert teacher.model.first.weight.dtype == torch.float32
    teacher.update(net, 0.5)
    other = Net()
    teacher.reset(other)
    assert teacher.model.frozen.bias is other.frozen.bias
    assert torch.equal(teacher.model.first.weight, other.first.weight)
    assert teacher.model.first.weight is not other.first.weight
    assert other.first.weight.requires_grad
    assert not teacher.model.first.weight.requires_grad
    teacher.to(torch.device("cpu"))
    other.frozen.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"`frozen.weight` frozen, as when the teacher was made"):
        teacher.update(other, 0.5)


def test_a_sharing_teacher_saves_and_takes_back_only_what_is_its_own():
    torch.manual_seed(0)
    net = Net()
    teacher = Teacher(net, share_frozen=True)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert set(state) == {"first.weight", "first.bias", "embed.weight", "out.weight", "count", "running"}
    before = net.frozen.weight.clone()
    teacher.update(Net(), 0.0)
    teacher.load_state_dict({name: value for name, value in state.items() if name != "out.weight"})
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert torch.equal(net.frozen.weight, before)
    shared = teacher.model.frozen.weight.clone()  # of the latest student
    teacher.load_state_dict({**state, "frozen.weight": shared * (1 + 1e-7)})  # of version 0.1, which averaged it
    assert torch.equal(teacher.model.frozen.weight, shared)
    with pytest.raises(ValueError, match=r"`frozen.weight` exists only in the other side"):
        teacher.load_state_dict({**state, "frozen.weight": shared + 0.1})


# ---- refusals ----


def refused(kind, message, act):
    with pytest.raises(kind, match=message) as error:
        act()
    assert str(error.value).endswith("see docs/backbones.md.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "cross_entropy", "distillation_weight": 0.0}, "objective 'contrastive' with LoRA"),
        ({"freeze": "text"}, "`freeze` None with LoRA"),
        ({"orthogonality_weight": 0.1}, "`orthogonality_weight` 0 where LoRA leaves the projection frozen, got 0.1"),
        ({"cross_norm_weight": 0.2}, "`cross_norm_weight` 0 where LoRA leaves the projection frozen, got 0.2"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "`use_reentrant` False with LoRA"),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, "`hub_strategy` 'end' with LoRA, got 'every_save'"),
    ],
)
def test_options_that_do_not_go_with_lora(make_trainer, processor, tmp_path, options, message):
    arguments = {"output_dir": str(tmp_path / "run"), "use_cpu": True, **options}
    refused(ValueError, message, lambda: CaRotTrainingArguments(**arguments, **RANK))
    if "push_to_hub" not in options:  # the parent's own constructor would ask the Hub
        refused(ValueError, message, lambda: make_trainer(model=adapted(processor), **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": -1}, "`lora_rank` >= 0, got -1"),
        ({"lora_alpha": 8}, "`lora_alpha` None, or >= 1 with `lora_rank` >= 1, got 8 with rank 0"),
        ({"lora_alpha": 0, "lora_rank": 4}, "got 0 with rank 4"),
    ],
)
def test_ranges(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CaRotTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def test_models_that_are_refused(make_trainer, processor, tmp_path):
    def trainer(model, **options):
        return lambda: make_trainer(model=model, **options)

    clip = lambda: tiny_clip(processor.tokenizer)  # noqa: E731
    ia3 = IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"])
    refused(TypeError, "got IA3 on a CLIPModel", trainer(get_peft_model(clip(), ia3)))
    tower = get_peft_model(clip().vision_model, LoraConfig(target_modules=["q_proj"]))
    refused(TypeError, "got LORA on a CLIPVision", trainer(tower))
    task = LoraConfig(target_modules=["q_proj"], task_type=TaskType.FEATURE_EXTRACTION)
    refused(TypeError, "on a CLIPModel for .*FEATURE_EXTRACTION", trainer(get_peft_model(clip(), task)))
    two = adapted(processor)
    two.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    refused(ValueError, r"one adapter, active and called 'default', got \['default', 'second'\]", trainer(two))
    still = adapted(processor)
    still.requires_grad_(False)
    refused(ValueError, "got frozen ones", trainer(still))
    refused(ValueError, "`lora_rank` 0 for a model with adapters, got 4", trainer(adapted(processor), **RANK))
    inner = clip()
    inner.add_adapter(LoraConfig(target_modules=["q_proj"]))
    refused(TypeError, "got one with adapters of `add_adapter`", trainer(inner))
    on_projection = get_peft_model(clip(), LoraConfig(target_modules=["visual_projection"]))
    refused(ValueError, "would be a constant", trainer(on_projection, orthogonality_weight=0.1))
    quantized = adapted(processor)
    quantized.get_base_model().is_quantized = True
    refused(ValueError, "not quantized", trainer(quantized))
    adapted(processor).save_pretrained(tmp_path / "run")
    refused(ValueError, "without adapters for the merged model, got .*run", trainer(adapted(processor)))
    plain = make_trainer(output_dir=str(tmp_path / "elsewhere"), **RANK)
    refused(ValueError, "without adapters for the merged model", lambda: plain.save_model(str(tmp_path / "run")))


def test_merges_ask_for_merged_models(processor):
    for act in (lambda a, b: interpolate(a, b), lambda a, b: uniform_soup([a, b]), lambda a, b: uniform_soup([a])):
        with pytest.raises(TypeError, match=r"without adapters, got a PeftModel with some. Merge them first"):
            act(adapted(processor), adapted(processor))
    one, two = (merged(adapted(processor)) for _ in range(2))
    assert isinstance(interpolate(one, two), CLIPModel)


@pytest.mark.parametrize("version", ["", "0.1"])
@pytest.mark.parametrize(
    ("saved", "resumed", "message", "old_message"),
    [
        (
            {},
            RANK,
            "`LoRA rank` 0 -> 4",
            r"checkpoint-2: adapter_model\.safetensors is missing",
        ),
        (
            RANK,
            {"lora_rank": 2},
            "`LoRA rank` 4 -> 2, `LoRA lora_alpha` 8 -> 4",
            r"`.*lora_A\.weight` of shape \(4, 16\) in place of \(2, 16\)",
        ),
        (RANK, {**RANK, "lora_alpha": 2}, "`LoRA lora_alpha` 8 -> 2", "`lora_alpha` 2 in .*checkpoint-2, got 8"),
        (RANK, {}, "`LoRA rank` 4 -> 0", r"checkpoint-2: model\.safetensors is missing"),
    ],
)
def test_a_checkpoint_of_another_kind_of_run_is_refused(make_trainer, version, saved, resumed, message, old_message):
    """Those of version 0.1 do not say what their run was; their adapters do."""
    trainer = make_trainer(save_strategy="steps", save_steps=2, max_steps=2, **saved)
    trainer.train()
    if version:
        checkpoint = Path(trainer.args.output_dir, "checkpoint-2")
        (checkpoint / "run.json").unlink()
        write_manifest(checkpoint)
        message = old_message
    with pytest.raises(ValueError, match=message):
        make_trainer(**resumed).train(resume_from_checkpoint=True)


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
sys.path.insert(0, {tests!r})
from launching import noise_trainer
from toys import tiny_clip
from transformers import CLIPModel
from carot_hf import CaRotTrainingArguments, interpolate

CLIPModel.from_pretrained({saved!r})
trainer = noise_trainer({out!r}, max_steps=2)
trainer.train()
trainer.save_model()
interpolate(trainer.model, tiny_clip(trainer.processing_class.tokenizer))
try:
    CaRotTrainingArguments(output_dir={out!r}, use_cpu=True, lora_rank=4)
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_peft_all_but_lora_works(make_trainer, tmp_path):
    make_trainer(**RANK).save_model(str(tmp_path / "saved"))
    code = WITHOUT_PEFT.format(tests=SUPPORT, out=str(tmp_path / "out"), saved=str(tmp_path / "saved"))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    last = result.stdout.strip().splitlines()[-1]
    assert last == "Expected peft for LoRA, got none. `pip install 'carot_hf[lora]'`; see docs/backbones.md."


@pytest.mark.slow
def test_what_is_pushed_is_merged(tmp_path):
    code = pushes.PUSH.replace("push_to_hub=", "lora_rank=4, push_to_hub=")
    code = code.format(tests=SUPPORT, out=str(tmp_path / "out"), early=True)
    with Hub() as hub:
        result = pushes.run(tmp_path, code, hub)
        assert result.returncode == 0, result.stderr[-3000:]
        files = hub.repos["tester/tiny"]
        assert not [name for name in files if "adapter" in name]
        assert b"lora" not in files["model.safetensors"] + files["config.json"]
        assert b"lora_rank" in files["README.md"]
        answer = pushes.run(tmp_path, pushes.USE.format(model="tester/tiny"), hub)
    assert sum(json.loads(answer.stdout).values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_the_example_with_lora(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "finetune_imagenet.py"), "--suite", "digits", "--use_cpu"]
    command += ["--lora_rank", "8", "--output_dir", str(tmp_path), "--max_steps", "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["metrics"]["eval_id_accuracy"] > 0.5
    loaded = CLIPModel.from_pretrained(tmp_path)
    assert loaded.config.calibration["temperature"] == report["calibration"]["temperature"]
