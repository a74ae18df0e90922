"""Metrics, fitted temperatures and baked temperatures against closed forms, slow loops, scipy and scikit-learn."""

from __future__ import annotations

import copy
import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import reference_calibration as reference
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score, top_k_accuracy_score
from torch import nn
from transformers import CLIPConfig, CLIPModel

from carot_hf.calibration.metrics import METRICS, calibration_metrics, top_label
from carot_hf.calibration.record import bake_temperature, unbake_temperature
from carot_hf.calibration.rows import row_chunks
from carot_hf.calibration.selective import smooth_ece
from carot_hf.calibration.sigmoid import fit_sigmoid
from carot_hf.calibration.temperature import fit_temperature, temperature_interval
from carot_hf.ece.binning import calibration_bins

CLOSED_FORMS = [(2, 2, 0.8, 1.4426950409), (10, 5, 0.7, 1.6422936938), (1000, 12, 0.8, 1.4469949228)]
HALVES = [torch.float16, torch.bfloat16]


def one_margin(classes, margin, accuracy, rows=10):
    """Every row is [margin, 0, ..., 0], and class 0 is right in the given share of them."""
    logits = torch.zeros(rows, classes, dtype=torch.float64)
    logits[:, 0] = margin
    labels = torch.ones(rows, dtype=torch.int64)
    labels[: round(accuracy * rows)] = 0
    return logits, labels


def sample(rows=400, classes=6, scale=2.0, seed=0, over=1.0):
    """Logits whose labels are drawn from softmax(logits / over): the true temperature is ``over``."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits * over, labels


# Metrics


@pytest.mark.parametrize(
    ("rows", "classes", "n_bins", "temperature"),
    [(60, 2, 10, 1.0), (90, 7, 15, 0.6), (40, 30, 10, 2.5), (1, 3, 1, 1.0)],
)
def test_metrics_agree_with_slow_loops(rows, classes, n_bins, temperature):
    logits, labels = sample(rows, classes, seed=rows)
    metrics = calibration_metrics(logits, labels, n_bins=n_bins, temperature=temperature)
    expected = reference.metrics(logits, labels, n_bins, temperature)
    assert all(type(value) is float for value in metrics.values())
    assert metrics.pop("smooth_ece") == smooth_ece(*top_label(logits, labels, temperature))  # its own tests have a loop
    assert metrics == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_metrics_of_ties_agree_with_slow_loops():
    """Logits of few values: equal ones rank by class index, and equal confidences stay together."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(0, 3, (80, 9), generator=generator).double()
    labels = torch.randint(0, 9, (80,), generator=generator)
    expected = reference.metrics(logits, labels, 10, 1.0)
    assert 0.3 < expected["top5_accuracy"] < 0.9
    metrics = calibration_metrics(logits, labels)
    compared = expected.keys() - {"augrc", "aurc"}  # the loop's confidences of equal rows differ by rounding
    assert [metrics[name] for name in compared] == pytest.approx([expected[name] for name in compared], abs=1e-12)


def test_metrics_agree_with_scikit_learn():
    logits, labels = sample(700, 8, over=1.7)
    probabilities = logits.softmax(1).numpy()
    confidences, correct = top_label(logits, labels)
    metrics = calibration_metrics(logits, labels)
    assert metrics["nll"] == pytest.approx(log_loss(labels, probabilities, labels=range(8)), abs=1e-12)
    assert metrics["auroc"] == pytest.approx(roc_auc_score(correct, confidences), abs=1e-12)
    assert metrics["top5_accuracy"] == top_k_accuracy_score(labels, logits, k=5)
    squares = [brier_score_loss(labels == k, probabilities[:, k]) for k in range(8)]
    assert metrics["brier"] == pytest.approx(sum(squares), abs=1e-12)


def test_batch_mean_weighs_the_last_batch_by_its_rows():
    logits, labels = sample(1100, 3, over=1.5)
    expected = sum(
        calibration_bins(*top_label(logits[i : i + 512], labels[i : i + 512])).ece * len(logits[i : i + 512])
        for i in (0, 512, 1024)
    )
    assert calibration_metrics(logits, labels)["ece_batch_mean"] == pytest.approx(expected / 1100, abs=1e-12)


def test_a_calibrated_model_has_a_small_ece_and_a_biased_batch_mean():
    metrics = calibration_metrics(*sample(20_480, 10, seed=2))
    assert metrics["ece"] < 0.01
    assert 0.02 < metrics["ece_batch_mean"] < 0.06


def test_a_perfect_model():
    metrics = calibration_metrics(torch.eye(4) * 200, torch.arange(4))
    assert math.isnan(metrics.pop("auroc"))
    expected = {**dict.fromkeys(METRICS.keys() - {"auroc"}, 0), "accuracy": 1, "top5_accuracy": 1, "macro_f1": 1}
    assert metrics == pytest.approx(expected, abs=1e-9)


def test_auroc_without_a_right_row_is_nan():
    assert math.isnan(calibration_metrics(2 * torch.eye(4), (torch.arange(4) + 1) % 4)["auroc"])


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_top5_of_at_most_five_classes_is_one(classes):
    assert calibration_metrics(*sample(50, classes))["top5_accuracy"] == 1.0


def test_metrics_in_float32_are_close_to_float64_and_confidences_keep_the_dtype():
    logits, labels = sample(500, 40, scale=3.0)
    exact, single = (calibration_metrics(z, labels, temperature=0.8) for z in (logits.float().double(), logits.float()))
    assert single == pytest.approx(exact, abs=1e-6)
    assert top_label(logits, labels)[0].dtype == np.float64
    assert top_label(logits.float(), labels)[0].dtype == np.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_worked_on_as_float32(dtype):
    logits, labels = sample(300, 20)
    logits = logits.to(dtype)
    assert calibration_metrics(logits, labels) == calibration_metrics(logits.float(), labels)
    assert fit_temperature(logits, labels) == fit_temperature(logits.float(), labels)
    np.testing.assert_array_equal(top_label(logits, labels)[0], top_label(logits.float(), labels)[0])


def test_numpy_gives_the_same_as_torch_and_inputs_stay_as_they_are():
    logits, labels = sample(100, 5)
    array, classes = logits.numpy().copy(), labels.numpy().astype(np.uint8)
    array.flags.writeable = False
    before = logits.clone()
    assert calibration_metrics(array, classes) == calibration_metrics(logits.requires_grad_(), labels)
    assert fit_temperature(array[::-1], classes[::-1]) == pytest.approx(fit_temperature(logits, labels), abs=1e-9)
    assert torch.equal(logits, before)


def test_chunks_of_rows_change_nothing(monkeypatch):
    logits, labels = sample(101, 6)
    whole = calibration_metrics(logits, labels), fit_temperature(logits, labels), top_label(logits, labels)
    monkeypatch.setattr("carot_hf.calibration.rows._CHUNK_VALUES", 45)  # 7 rows, and 3 in the last chunk
    assert calibration_metrics(logits, labels) == pytest.approx(whole[0], abs=1e-12)
    assert fit_temperature(logits, labels) == pytest.approx(whole[1], abs=1e-9)
    np.testing.assert_array_equal(top_label(logits, labels), whole[2])
    monkeypatch.setattr("carot_hf.calibration.rows._CHUNK_VALUES", 1)
    assert calibration_metrics(logits, labels) == pytest.approx(whole[0], abs=1e-12)


def test_top_label_takes_the_first_of_equal_logits_and_the_argmax_as_given():
    confidences, correct = top_label(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]), torch.tensor([0, 1]), 2.0)
    np.testing.assert_array_equal(correct, [True, False])
    np.testing.assert_allclose(confidences, math.exp(0.5) / (2 * math.exp(0.5) + 1), rtol=1e-6)
    near = torch.tensor([[1.0, 1.0 + 1e-7]])  # equal once divided by 1e9
    assert top_label(near, torch.tensor([1]), 1e9)[1].all()


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e9])
def test_masked_classes_and_a_masked_label(value):
    logits = torch.tensor([[2.0, 0.0, value], [1.0, 3.0, value], [0.0, 2.0, value]])
    kept = calibration_metrics(logits[:, :2], torch.tensor([0, 0, 1]))
    masked = calibration_metrics(logits, torch.tensor([0, 0, 1]))
    assert masked == pytest.approx({**kept, "classwise_ece": masked["classwise_ece"]}, abs=1e-6)
    wide = fit_temperature(logits, torch.tensor([0, 0, 1]), bounds=(0.1, 50))
    assert wide == pytest.approx(fit_temperature(logits[:, :2], torch.tensor([0, 0, 1]), bounds=(0.1, 50)), abs=1e-5)
    assert calibration_metrics(logits, torch.tensor([0, 0, 2]))["nll"] > 1e8


# Fitting


@pytest.mark.parametrize("criterion", ["nll", "ece"])
@pytest.mark.parametrize(("classes", "margin", "accuracy", "published"), CLOSED_FORMS)
def test_closed_forms(classes, margin, accuracy, published, criterion):
    logits, labels = one_margin(classes, margin, accuracy)
    expected = margin / math.log(accuracy * (classes - 1) / (1 - accuracy))
    assert expected == pytest.approx(published, abs=1e-9)
    temperature = fit_temperature(logits, labels, criterion=criterion)
    assert temperature == pytest.approx(expected, abs=1e-8)
    assert calibration_metrics(logits, labels, temperature=temperature)["ece"] < 1e-8
    for dtype in [torch.float32, *HALVES]:  # these logits are exact in every dtype
        assert fit_temperature(logits.to(dtype), labels, criterion=criterion) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("over", "scale", "seed"), [(0.7, 2.0, 0), (1.0, 0.5, 1), (3.0, 3.0, 2), (8.0, 1.0, 3)])
def test_the_nll_optimum_agrees_with_scipy(over, scale, seed):
    logits, labels = sample(300, 6, scale=scale, seed=seed, over=over)

    def nll(log_temperature):
        temperature = math.exp(log_temperature)
        rows = zip(logits.tolist(), labels.tolist(), strict=True)
        return sum(reference.negative_log_likelihood(row, label, temperature) for row, label in rows)

    best = minimize_scalar(nll, bounds=(math.log(0.1), math.log(50)), method="bounded", options={"xatol": 1e-9})
    temperature = fit_temperature(logits, labels, bounds=(0.1, 50))
    assert temperature == pytest.approx(math.exp(best.x), rel=1e-6)
    assert fit_temperature(logits.float(), labels, bounds=(0.1, 50)) == pytest.approx(temperature, rel=1e-5)


def test_a_true_temperature_of_three_is_found():
    logits, labels = sample(20_000, 10, scale=1.5, over=3.0)
    assert fit_temperature(logits, labels) == pytest.approx(3.0, rel=0.02)
    assert fit_temperature(logits, labels, criterion="ece") == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("factor", [0.25, 2.0, 7.0])
def test_temperature_scales_with_the_logits(factor):
    logits, labels = sample(500, 8)
    whole, scaled = (fit_temperature(c * logits, labels, bounds=(0.01, 100)) for c in (1.0, factor))
    assert scaled == pytest.approx(factor * whole, rel=1e-8)


@pytest.mark.parametrize("criterion", ["nll", "ece"])
def test_row_shifts_permutations_and_duplicates_change_no_temperature(criterion):
    logits, labels = sample(200, 5, over=2.0)
    expected = fit_temperature(logits, labels, criterion=criterion)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shifts = torch.linspace(-30, 30, 200, dtype=torch.float64)[:, None]
    for other, classes in [
        (logits + shifts, labels),
        (logits[order], labels[order]),
        (logits.repeat(3, 1), labels.repeat(3)),
        (logits[:, [4, 2, 0, 1, 3]], torch.tensor([2, 3, 1, 4, 0])[labels]),
    ]:
        assert fit_temperature(other, classes, criterion=criterion) == pytest.approx(expected, rel=1e-6)


def test_dividing_by_the_temperature_leaves_nothing_to_fit_and_accuracy_alone():
    logits, labels = sample(400, 7, over=2.5)
    temperature = fit_temperature(logits, labels)
    assert fit_temperature(logits / temperature, labels) == pytest.approx(1.0, abs=1e-8)
    before, after = calibration_metrics(logits, labels), calibration_metrics(logits, labels, temperature=temperature)
    assert after == pytest.approx(calibration_metrics(logits / temperature, labels), abs=1e-12)
    assert after["accuracy"] == before["accuracy"]
    assert after["top5_accuracy"] == before["top5_accuracy"]
    assert after["nll"] < before["nll"]


@pytest.mark.parametrize("seed", [0, 2, 5])
def test_the_ece_optimum_is_at_least_as_good_as_a_fine_grid(seed):
    logits, labels = sample(300, 5, over=1.8, seed=seed)
    correct = top_label(logits, labels)[1]

    def ece(temperature):
        return calibration_bins(top_label(logits, labels, temperature)[0], correct).ece

    temperature = fit_temperature(logits, labels, criterion="ece")
    assert 0.5 <= temperature <= 10
    assert ece(temperature) <= min(ece(t) for t in np.geomspace(0.5, 10, 1000)) + 1e-6
    assert ece(temperature) < ece(fit_temperature(logits, labels)) - 0.005


def test_few_passes_over_the_rows_are_made(monkeypatch):
    passes = []
    for module in ("rows", "temperature_nll"):
        place = f"carot_hf.calibration.{module}.row_chunks"
        monkeypatch.setattr(place, lambda *args: passes.append(1) or row_chunks(*args))
    fit_temperature(*sample(500, 10, over=2.0))
    assert len(passes) <= 9  # one to check, two to prepare, and the Newton steps
    passes.clear()
    fit_temperature(torch.eye(3) * 1e4, torch.arange(3))  # no slope to follow
    assert len(passes) <= 9


def test_equal_values_of_ece_go_to_the_nll_optimum(caplog):
    logits, labels = one_margin(2, 1000.0, 0.8)  # the confidence rounds to 1 at all temperatures up to 10
    assert fit_temperature(logits, labels, criterion="ece") == 10.0
    assert "bound 10" in caplog.text
    flat = torch.cat([logits, torch.zeros(2, 2, dtype=torch.float64)]), torch.cat([labels, torch.tensor([0, 1])])
    assert fit_temperature(*flat, criterion="ece", bounds=(0.5, 5.0)) == 5.0


@pytest.mark.parametrize("criterion", ["nll", "ece"])
@pytest.mark.parametrize("scale", [2.0, 30.0, 1e4])
def test_an_optimum_at_a_bound_is_logged(caplog, criterion, scale):
    right = torch.eye(3, dtype=torch.float64) * scale
    with caplog.at_level(logging.WARNING, logger="carot_hf.calibration.temperature"):
        assert fit_temperature(right, torch.arange(3), criterion=criterion, bounds=(0.6, 7)) == 0.6
        assert "bound 0.6 of [0.6, 7]" in caplog.text
        caplog.clear()
        highest = fit_temperature(right, (torch.arange(3) + 1) % 3, criterion=criterion, bounds=(0.6, 7))
        assert type(highest) is float
        assert highest == 7.0
        assert "bound 7 of [0.6, 7]" in caplog.text


def test_an_optimum_inside_the_bounds_is_not_logged(caplog):
    fit_temperature(*sample(100, 4))
    assert not caplog.records


def test_logits_that_say_nothing_keep_the_temperature():
    assert fit_temperature(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == 1.0


def test_large_logits_do_not_overflow():
    logits, labels = sample(200, 5)
    assert fit_temperature(logits * 1e5, labels, bounds=(1.0, 1e7)) == pytest.approx(
        1e5 * fit_temperature(logits, labels, bounds=(0.01, 100)), rel=1e-6
    )


# Validation


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (torch.zeros(3), [0, 1, 0], {}, r"shape \(N, K\).*got torch.float32 of shape \(3,\)"),
        (torch.zeros(3, 1), [0, 0, 0], {}, r"K >= 2, got .*\(3, 1\)"),
        (torch.zeros(0, 2), [], {}, r"N >= 1.*got .*\(0, 2\)"),
        (torch.zeros(3, 2, dtype=torch.int64), [0, 1, 0], {}, "float dtype.*got torch.int64"),
        (torch.zeros(3, 2), [0, 1], {}, r"`labels` of shape \(3,\), got \(2,\)"),
        (
            torch.zeros(2, 2),
            [[0, 1], [1, 0]],
            {},
            r"`labels` of shape \(2,\), got one-hot rows.*argmax",
        ),
        (torch.zeros(3, 2), [0.0, 1.0, 1.0], {}, "integer dtype, got torch.float"),
        (torch.zeros(3, 2), [False, True, True], {}, "integer dtype, got torch.bool"),
        (torch.zeros(3, 2), [0, 1, 2], {}, r"in \[0, 2\), got 2 in row 2"),
        (torch.zeros(3, 2), [0, -100, 1], {}, r"in \[0, 2\), got -100 in row 1"),
        (torch.tensor([[0, 1], [0, math.nan]]), [0, 1], {}, "finite `logits`, got nan in row 1, column 1"),
        (torch.tensor([[0, 1], [math.inf, 0]]), [0, 1], {}, "finite `logits`, got inf in row 1, column 0"),
        (torch.zeros(1, 2), [0], {"temperature": 0.0}, "`temperature` above 0, got 0.0"),
        (torch.zeros(1, 2), [0], {"temperature": -1.0}, "`temperature` above 0, got -1.0"),
        (torch.zeros(1, 2), [0], {"temperature": math.nan}, "`temperature` above 0, got nan"),
        (torch.zeros(1, 2), [0], {"temperature": math.inf}, "finite `temperature`.*got inf"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(logits, labels, options, message):
    labels = torch.tensor(labels) if labels else torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"(?s)Expected.*{message}"):
        calibration_metrics(logits, labels, **options)
    with pytest.raises(ValueError, match=f"(?s)Expected.*{message}"):
        top_label(logits, labels, **options)
    if not options:
        with pytest.raises(ValueError, match=f"(?s)Expected.*{message}"):
            fit_temperature(logits, labels)


def test_finite_logits_whose_sum_is_not_are_allowed():
    logits = torch.full((3, 2), 3e38)
    assert calibration_metrics(logits, torch.tensor([0, 1, 0]))["nll"] == pytest.approx(math.log(2))


def test_a_bad_row_beyond_the_first_chunk_is_named(monkeypatch):
    monkeypatch.setattr("carot_hf.calibration.rows._CHUNK_VALUES", 8)
    logits = torch.zeros(20, 4)
    logits[17, 3] = logits[17, 2] = logits[18, 0] = math.nan
    with pytest.raises(ValueError, match="row 17, column 2"):
        top_label(logits, torch.zeros(20, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "brier"}, "'nll', 'ece'.*got 'brier'"),
        ({"bounds": (2.0, 1.0)}, r"0 < low < high, got \(2.0, 1.0\)"),
        ({"bounds": (0.0, 1.0)}, r"got \(0.0, 1.0\)"),
        ({"bounds": (1.0, math.inf)}, "0 < low < high"),
    ],
)
def test_options_of_the_fit_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(torch.zeros(2, 2), torch.tensor([0, 1]), **options)


def test_n_bins_is_checked_before_the_work():
    with pytest.raises(ValueError, match=r"`n_bins`.*got 0"):
        calibration_metrics(torch.zeros(2, 2), torch.tensor([0, 1]), n_bins=0)


# Baking


@pytest.fixture
def clip():
    torch.manual_seed(0)
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 19, "bos_token_id": 18}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).eval()


@torch.no_grad()
def clip_logits(model):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(16, 3, 8, 8, generator=generator)
    tokens = torch.tensor([[18, i, i + 1, 19] for i in range(5)])
    return model(input_ids=tokens, pixel_values=pixels).logits_per_image


def states_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.8, 10.0])
def test_baking_divides_the_logits_and_unbaking_restores_every_bit(clip, temperature):
    original, before, parameter = copy.deepcopy(clip), clip_logits(clip), clip.logit_scale
    bake_temperature(clip, temperature)
    assert clip.logit_scale is parameter
    assert clip.logit_scale.dtype == torch.float32
    assert clip.logit_scale.shape == ()
    assert clip.config.calibration == {"temperature": temperature}
    torch.testing.assert_close(clip_logits(clip), before / temperature, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(clip_logits(clip).softmax(1), (before / temperature).softmax(1), rtol=0, atol=3e-7)
    unbake_temperature(clip)
    assert states_equal(clip, original)
    assert not hasattr(clip.config, "calibration")


def test_unbaking_restores_every_bit_of_many_scales():
    """Also where the baked scale is in the next binade and two values would round to it."""
    generator = np.random.default_rng(0)
    noted = 0
    for scale in generator.uniform(-1, 5, 2000).astype(np.float32):
        model = nn.Module()
        model.config, model.logit_scale = SimpleNamespace(), nn.Parameter(torch.tensor(float(scale)))
        bake_temperature(model, float(generator.uniform(0.5, 10)))
        noted += "logit_scale_before" in model.config.calibration
        model.config.calibration = json.loads(json.dumps(model.config.calibration))
        unbake_temperature(model)
        assert model.logit_scale.item() == scale
    assert 0 < noted < 2000


def test_the_record_survives_saving_and_loading(clip, tmp_path):
    original, before = copy.deepcopy(clip), clip_logits(clip)
    record = {"criterion": "nll", "rows": 100, "split": "validation", "ece": 0.05, "templates": ["a {}"]}
    bake_temperature(clip, 1.7, record=record)
    clip.save_pretrained(tmp_path)
    loaded = CLIPModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.config.calibration == {"temperature": 1.7, **record}
    assert not hasattr(loaded.config, "temperature")
    assert states_equal(loaded, clip)
    torch.testing.assert_close(clip_logits(loaded), before / 1.7, rtol=1e-6, atol=1e-7)
    assert torch.equal(clip_logits(loaded).argmax(1), before.argmax(1))
    with pytest.raises(RuntimeError, match="without a baked temperature"):
        bake_temperature(loaded, 2.0)
    unbake_temperature(loaded)
    assert states_equal(loaded, original)
    loaded.save_pretrained(tmp_path / "plain")
    assert not hasattr(CLIPModel.from_pretrained(tmp_path / "plain").config, "calibration")


def test_a_fitted_temperature_calibrates_the_model_it_is_baked_into(clip):
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(60.0))
    logits = clip_logits(clip)
    labels = torch.multinomial((logits / 2).softmax(1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    temperature = fit_temperature(logits, labels, bounds=(0.05, 100))
    expected = calibration_metrics(logits, labels, temperature=temperature)
    bake_temperature(clip, temperature)
    assert calibration_metrics(clip_logits(clip), labels) == pytest.approx(expected, abs=1e-5)
    assert fit_temperature(clip_logits(clip), labels) == pytest.approx(1.0, abs=1e-4)


def test_a_temperature_is_baked_once_and_taken_out_once(clip):
    original = copy.deepcopy(clip)
    with pytest.raises(RuntimeError, match="with a baked temperature, got one without"):
        unbake_temperature(clip)
    bake_temperature(clip, 2.0)
    baked = copy.deepcopy(clip)
    with pytest.raises(RuntimeError, match=r"without a baked temperature, got one with .*2\.0"):
        bake_temperature(clip, 2.0)
    assert states_equal(clip, baked)
    unbake_temperature(clip)
    with pytest.raises(RuntimeError, match="nothing to undo"):
        unbake_temperature(clip)
    bake_temperature(clip, 3.0)
    assert clip.logit_scale.item() == pytest.approx(original.logit_scale.item() - math.log(3.0), abs=1e-6)


def test_a_scale_trained_after_baking_keeps_its_training():
    model = nn.Module()
    model.config, model.logit_scale = SimpleNamespace(), nn.Parameter(torch.tensor(3.9))
    bake_temperature(model, 0.5)
    model.config.calibration["logit_scale_before"] = model.config.calibration.get("logit_scale_before", 3.9)
    with torch.no_grad():
        model.logit_scale.add_(0.25)
    unbake_temperature(model)
    assert model.logit_scale.item() == pytest.approx(4.15, abs=1e-6)


@pytest.mark.parametrize(
    ("temperature", "record", "message"),
    [
        (0.0, None, "`temperature` above 0, got 0.0"),
        (-1.0, None, "got -1.0"),
        (math.nan, None, "got nan"),
        (2.0, {"temperature": 3.0}, "without the key 'temperature'"),
        (2.0, {"logit_scale_before": 3.0}, "without the key 'logit_scale_before'"),
        (2.0, {"labels": np.arange(2)}, "JSON types"),
        (2.0, {"ece": math.nan}, "JSON types"),
    ],
)
def test_bad_arguments_change_no_weight(clip, temperature, record, message):
    original = copy.deepcopy(clip)
    with pytest.raises(ValueError, match=f"(?s)Expected.*{message}"):
        bake_temperature(clip, temperature, record=record)
    assert states_equal(clip, original)
    assert not hasattr(clip.config, "calibration")


@pytest.mark.parametrize("dtype", HALVES)
def test_a_scale_in_half_precision_is_refused(clip, dtype):
    clip.to(dtype)
    with pytest.raises(ValueError, match=r"float32 parameter.*got torch.b?float16.*model.float\(\)"):
        bake_temperature(clip, 2.0)
    bake_temperature(clip.float(), 2.0)


def test_a_model_without_a_place_for_a_temperature_is_refused():
    bare, wrapped = nn.Module(), nn.Module()
    bare.config = SimpleNamespace()
    wrapped.module, wrapped.logit_scale = bare, nn.Parameter(torch.zeros(()))
    for model in (bare, wrapped):
        for call in (lambda m: bake_temperature(m, 2.0), unbake_temperature):
            with pytest.raises(TypeError, match=r"`config` and a `logit_scale` or a linear.*got Module"):
                call(model)


@pytest.mark.parametrize("name", ["head", "classifier"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_head_is_divided(name, bias):
    torch.manual_seed(0)
    model = nn.Module()
    model.config, head = SimpleNamespace(), nn.Linear(12, 7, bias=bias)
    setattr(model, name, head)
    features, original = torch.randn(9, 12), copy.deepcopy(head)
    bake_temperature(model, 1.9, record={"rows": 9})
    assert model.config.calibration == {"temperature": 1.9, "rows": 9}
    torch.testing.assert_close(head(features), original(features) / 1.9, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError):
        bake_temperature(model, 1.9)
    unbake_temperature(model)
    for parameter, before in zip(head.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(parameter, before, rtol=3e-7, atol=0)
    assert not hasattr(model.config, "calibration")


def test_a_head_in_half_precision_is_refused():
    model = nn.Module()
    model.config, model.head = SimpleNamespace(), nn.Linear(3, 2).bfloat16()
    with pytest.raises(ValueError, match="float32 parameter"):
        bake_temperature(model, 2.0)


# ---- how well a temperature is known ----


@pytest.mark.parametrize(("classes", "margin", "right", "rows"), [(2, 2.0, 0.8, 20), (10, 5.0, 0.7, 40)])
def test_the_interval_of_a_temperature_is_where_the_likelihood_falls_by_half_of_chi_squared(
    classes, margin, right, rows
):
    """Logits ``[m, 0, ..., 0]``: the NLL is ``ln(1 + (K - 1) e^{-m/T}) + (1 - a) m / T``, its ends by scipy."""
    from scipy.optimize import brentq
    from scipy.stats import chi2

    logits, labels = one_margin(classes, margin, right, rows)
    best = margin / math.log(right * (classes - 1) / (1 - right))

    def rise(temperature):
        def nll(t):
            return math.log1p((classes - 1) * math.exp(-margin / t)) + (1 - right) * margin / t

        return rows * (nll(temperature) - nll(best)) - chi2.ppf(0.95, 1) / 2

    low, high = temperature_interval(logits, labels)
    assert low == pytest.approx(brentq(rise, 0.05, best), rel=1e-6)
    assert high == pytest.approx(brentq(rise, best, 20.0) if rise(20.0) > 0 else 20.0, rel=1e-6)
    more = temperature_interval(logits.repeat(100, 1), labels.repeat(100))
    assert low < more[0] < best < more[1] < high
    with pytest.raises(ValueError, match="`link`"):
        temperature_interval(logits, labels, link="probit")


def test_the_interval_with_a_sigmoid_profiles_the_bias():
    """A shift of all logits is taken up by the bias; the best one at a temperature is that of a logistic regression."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    labels = logits.argmax(dim=1)
    labels[:12] = torch.randint(0, 4, (12,), generator=generator)
    interval = temperature_interval(logits, labels, link="sigmoid")
    assert temperature_interval(logits + 3.0, labels, link="sigmoid") == pytest.approx(interval, rel=1e-6)
    temperature, _ = fit_sigmoid(logits, labels)
    assert interval[0] < temperature < interval[1]
    assert temperature_interval(2.0 * logits, labels, link="sigmoid", bounds=(0.1, 40.0)) == pytest.approx(
        (2 * interval[0], 2 * interval[1]), rel=1e-5
    )
