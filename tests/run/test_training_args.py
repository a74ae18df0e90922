"""Presets, defaults that differ and are written down, options that fail before a model loads."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from carot_hf import CaRotTrainingArguments
from carot_hf.data.loaders import images_at_once
from carot_hf.presets import PRESETS


def make(tmp_path, **arguments):
    return CaRotTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("flyp", {"distillation_weight": 0.0, "label_smoothing_factor": 0.0}),
        ("flyp-ls", {"distillation_weight": 0.0, "label_smoothing_factor": 0.1}),
        ("carot", {"distillation_weight": 0.75, "orthogonality_weight": 0.0, "cross_norm_weight": 0.0}),
        ("carot-2024", {"distillation_weight": 3.0, "orthogonality_weight": 0.2, "cross_norm_weight": 0.05}),
    ],
)
def test_presets(tmp_path, preset, expected):
    args = CaRotTrainingArguments.from_preset(preset, output_dir=str(tmp_path), use_cpu=True)
    protocol = {
        "learning_rate": 1e-5,
        "weight_decay": 0.1,
        "warmup_steps": 500,
        "num_train_epochs": 10,
        "per_device_train_batch_size": 512,
        "max_grad_norm": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "teacher_update_every": 500,
        "teacher_momentum_start": 0.05,
        "teacher_momentum_end": 0.9,
        "teacher_momentum_ramp": 0.2,
    }
    for name, value in {**protocol, **expected}.items():
        assert getattr(args, name) == value, name
    assert args.lr_scheduler_type == "cosine"
    assert PRESETS[preset].source


def test_overrides_go_before_the_preset(tmp_path):
    args = CaRotTrainingArguments.from_preset(
        "carot", output_dir=str(tmp_path), use_cpu=True, distillation_weight=2.0, learning_rate=3e-5
    )
    assert (args.distillation_weight, args.learning_rate) == (2.0, 3e-5)


def test_every_default_that_differs_says_so_and_every_option_of_ours_has_help():
    """The one place is the field's help; the site makes a table of it."""
    parents = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    own = inspect.get_annotations(CaRotTrainingArguments)
    changed = []
    for field in dataclasses.fields(CaRotTrainingArguments):
        parent = parents.get(field.name)
        if parent is None or parent.default != field.default:
            changed += [] if parent is None else [field.name]
            assert field.name in own, field.name
            assert field.metadata["help"], field.name
            assert parent is None or field.metadata["help"] != parent.metadata.get("help"), field.name
    assert len(changed) >= 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distillation_weight": -1.0}, r"`distillation_weight` >= 0 and finite, got -1.0"),
        ({"orthogonality_weight": float("nan")}, r"`orthogonality_weight` >= 0 and finite, got nan"),
        ({"cross_norm_weight": float("inf")}, r"`cross_norm_weight` >= 0 and finite, got inf"),
        ({"teacher_momentum_start": 1.5}, r"`teacher_momentum_start` in \[0, 1\], got 1.5"),
        ({"teacher_momentum_end": -0.1}, r"`teacher_momentum_end` in \[0, 1\], got -0.1"),
        ({"teacher_momentum_ramp": 500}, r"`teacher_momentum_ramp` in \[0, 1\], got 500"),
        ({"teacher_update_every": -1}, r"`teacher_update_every` >= 0, got -1"),
        ({"label_smoothing_factor": 1.0}, r"`label_smoothing_factor` in \[0, 1\), got 1.0"),
        ({"n_bins": 0}, r"`n_bins` >= 1, got 0"),
        ({"calibration_criterion": "mse"}, r"'nll' or 'ece', got 'mse'"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics"),
        ({"bf16_full_eval": True}, "They round the model's own weights"),
        ({"deepspeed": "/no/such.json"}, r"Expected a DeepSpeed config, got no such file: /no/such.json"),
        ({"metric_for_best_model": "eval_ood_ece"}, "spoils them as tests"),
        ({"metric_for_best_model": "ood_accuracy"}, "spoils them as tests"),
        ({"fsdp": "full_shard"}, "got FSDP. It shards weights: CLIP's logit_scale"),
    ],
)
def test_bad_options_say_expected_got_cure(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **arguments)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"Expected a preset of \['car-ft', 'carot', .*\], got 'clip'"):
        CaRotTrainingArguments.from_preset("clip")


def test_sharding_engines_are_refused_with_the_reason(tmp_path, monkeypatch):
    stage3 = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match=r"got DeepSpeed ZeRO-3\. It shards weights"):
        make(tmp_path, deepspeed=stage3)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(stage3))
    with pytest.raises(ValueError, match="got DeepSpeed ZeRO-3"):
        make(tmp_path, deepspeed=str(path))
    with monkeypatch.context() as patch:  # as `accelerate launch --use_fsdp` sets it
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="got FSDP"):
            make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        patch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
        with pytest.raises(ValueError, match="got DeepSpeed ZeRO-3"):
            make(tmp_path)


def test_best_metric_is_a_validation_metric_unless_named(tmp_path):
    both = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    args = make(tmp_path, **both)
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_validation_nll", False)
    args = make(tmp_path, **both, metric_for_best_model="eval_id_accuracy")
    assert args.greater_is_better is True
    assert make(tmp_path, **both, metric_for_best_model="eval_id_ece_ts").greater_is_better is False
    with pytest.raises(ValueError, match="Expected `greater_is_better` False for"):
        make(tmp_path, **both, metric_for_best_model="eval_id_ece", greater_is_better=True)


def test_command_line(tmp_path):
    parser = HfArgumentParser(CaRotTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--distillation_weight", "1.5", "--parity", "true"]
    )
    assert (args.distillation_weight, args.parity, args.resume_from_checkpoint) == (1.5, True, None)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--resume_from_checkpoint"])
    assert args.resume_from_checkpoint == "latest"
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--resume_from_checkpoint", "a/b"])
    assert args.resume_from_checkpoint == "a/b"
    help_text = parser.format_help()
    assert "Weight (lambda) of the distillation" in help_text


def test_batches_of_an_evaluation_are_small_on_a_cpu_unless_somebody_says_it(tmp_path):
    assert [images_at_once(torch.device(kind)) for kind in ("cpu", "cuda", "mps")] == [32, 256, 256]
    assert [images_at_once(torch.device(kind), 64) for kind in ("cpu", "cuda")] == [32, 64]
    assert make(tmp_path).per_device_eval_batch_size == make(tmp_path).eval_batch_size == 32
    assert make(tmp_path, per_device_eval_batch_size=7).per_device_eval_batch_size == 7
    assert CaRotTrainingArguments.from_preset("ft", output_dir=str(tmp_path), use_cpu=True).eval_batch_size == 32
