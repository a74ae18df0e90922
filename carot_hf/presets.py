"""The methods of the papers, as arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A method of a paper: the arguments in which it differs from the defaults, and where they come from."""

    arguments: Mapping[str, Any]
    source: str


_FT = {"objective": "cross_entropy", "distillation_weight": 0.0, "learning_rate": 3e-5, "max_grad_norm": 1.0}
PRESETS: dict[str, Preset] = {
    "ft": Preset(
        _FT,
        "Cross-entropy of a linear head that starts as the zero-shot classes; the text tower is left behind. CaRot "
        "2023, A.1; WiSE-FT (arXiv 2109.01903).",
    ),
    "ft-ls": Preset(
        {**_FT, "label_smoothing_factor": 0.1},
        "ft with smoothed targets. CaRot 2023, Table 1; the paper picks epsilon from {0.01, 0.03, 0.05, 0.1, 0.2} on "
        "the validation split.",
    ),
    "lp-ft": Preset(
        {**_FT, "linear_probe": True},
        "A linear probe on the frozen tower first, then ft from that head. Kumar et al. 2022 (arXiv 2202.10054).",
    ),
    "flyp": Preset(
        {"distillation_weight": 0.0},
        "Contrastive loss alone. FLYP (arXiv 2212.00638); the baseline of CaRot's Table 1.",
    ),
    "flyp-ls": Preset(
        {"distillation_weight": 0.0, "label_smoothing_factor": 0.1},
        "Contrastive loss with smoothed targets in both directions. CaRot 2023, section 2.3; the paper picks epsilon "
        "from {0.01, 0.03, 0.05, 0.1, 0.2} on the validation split.",
    ),
    "carot": Preset(
        {"distillation_weight": 0.75},
        "Contrastive loss + 0.75 x distillation from an EMA teacher that moves every 500 steps. CaRot 2023, Eq. 1-2.",
    ),
    "carot-2024": Preset(
        {"distillation_weight": 3.0, "orthogonality_weight": 0.2, "cross_norm_weight": 0.05},
        "The NeurIPS 2024 version: with both projections held apart and the visual one near orthonormal. Its code "
        "halves the contrastive term but sums the two directions of the distillation with weight 1.5: 3.0 here.",
    ),
    "tracer": Preset(
        {
            "distillation_weight": 1.8,
            "feature_distillation_weight": 0.9,
            "cross_norm_weight": 0.05,
            "teacher": "beta",
            "teacher_update_every": 1,
        },
        "Distillation of features and of contrastive relations from a beta-weighted mean of all snapshots. TRACER "
        "(arXiv 2605.29380): its FD + CRD, 0.9 (L_fd + 2 L_kd), without ICL and CrossKD. The published code weighs "
        "0.9 (3.906 L_fd + L_kd + ICL + CrossKD) and flips images.",
    ),
    "static": Preset(
        {"distillation_weight": 0.75, "teacher": "frozen"},
        "CaRot with a teacher that never moves: the last row of CaRot 2023's Table 2; Static SD of TRACER "
        "(arXiv 2605.29380), Table 2, whose weight is not said.",
    ),
    "fd": Preset(
        {
            "distillation_weight": 0.0,
            "feature_distillation_weight": 0.9,
            "teacher": "beta",
            "teacher_update_every": 1,
        },
        "Contrastive loss + distillation of features alone from a beta-weighted mean of all snapshots. TRACER "
        "(arXiv 2605.29380), Table 8; the weight is that of our tracer, the published code has 0.9 x 3.906.",
    ),
    "l2-sp": Preset(
        {"distillation_weight": 0.0, "l2_sp_weight": 0.01},
        "Contrastive loss + the squared distance of the weights to those of the start. Li et al. 2018 "
        "(arXiv 1802.01483), Eq. 5; on CLIP in TRACER (arXiv 2605.29380), Table 2, which does not say the weight: 0.01 "
        "is ours.",
    ),
    "dive": Preset(
        {"distillation_weight": 0.0, "difference_vector_weight": 1000.0},
        "Contrastive loss + 1,000 x (AVL + PVL): all images and texts are to move alike. DiVE (arXiv 2511.09973), read "
        "in notes on the paper, which has no public code; it takes a reference set such as CC3M where this takes the "
        "training batch.",
    ),
    "lipsum": Preset(
        {
            "objective": "cross_entropy",
            "distillation_weight": 0.0,
            "energy_gap_weight": 1.0,
            "weight_decay": 0.0,
        },
        "ft + the squared difference to the start model's energies with 80 random texts a step. Lipsum-FT "
        "(arXiv 2404.00860); weight, rate and decay of its code, which takes batches of 256 and 50,000 steps and keeps "
        "exp(logit_scale) apart from the head that is trained.",
    ),
    "car-ft": Preset(
        {**_FT, "context_distillation_weight": 1.0},
        "ft + the divergence from the start model's distribution over the templates. CAR-FT (arXiv 2211.16175); "
        "weight, direction and scale are not in what could be read of it: 1, that of distillation, the start model's.",
    ),
}


_LOSS = ("objective", "linear_probe", "label_smoothing_factor")  # beside weights of terms and the teacher


def loss_preset(values: Mapping[str, Any], defaults: Mapping[str, Any], weights: Sequence[str]) -> str | None:
    """Name the preset that has this loss and this kind of teacher; ``None``: no preset has.

    Whatever epsilon a smoothed preset has, it is that preset: its source has several. Learning rates and steps between
    updates do not count.

    Args:
        values: Of the training arguments.
        defaults: Of the same arguments; of others they are 0.
        weights: Names of the arguments that weigh terms.
    """

    def loss(arguments: Mapping[str, Any]) -> list[Any]:
        found = {name: arguments.get(name, defaults.get(name, 0)) for name in (*_LOSS, *weights, "teacher")}
        found["label_smoothing_factor"] = found["label_smoothing_factor"] > 0
        taught = found["distillation_weight"] > 0 or found["feature_distillation_weight"] > 0
        return [value for name, value in found.items() if taught or name != "teacher"]

    return next((name for name, preset in PRESETS.items() if loss(preset.arguments) == loss(values)), None)


def preset_arguments(preset: str) -> dict[str, Any]:
    """Return the arguments of a preset, or raise a ValueError that lists the presets."""
    if preset not in PRESETS:
        raise ValueError(f"Expected a preset of {sorted(PRESETS)}, got {preset!r}. Correct the name.")
    return dict(PRESETS[preset].arguments)
