"""Fine-tune CLIP so that it stays robust and calibrated when the data shift."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CLIPClassifier": "models.classifier",
    "CaRotTrainer": "trainer",
    "CaRotTrainingArguments": "training_args",
    "CalibratedZeroShotPipeline": "models.pipeline",
    "Comparison": "evaluation.compare",
    "ConformalSets": "calibration.conformal",
    "DensityCalibrator": "calibration.density",
    "Evaluation": "evaluation.evaluation",
    "Evaluator": "evaluation.evaluator",
    "ShiftSet": "data.shift_set",
    "ShiftSuite": "data.suite",
    "Teacher": "teacher.average",
    "TeacherCallback": "teacher.callback",
    "VRF": "calibration.vrf",
    "alpha_sweep": "models.merging",
    "bake_temperature": "calibration.record",
    "calibration_metrics": "calibration.metrics",
    "clip_from_state_dict": "models.convert",
    "compare": "evaluation.compare",
    "confidence_histogram": "evaluation.plots",
    "estimate_accuracy": "calibration.estimate",
    "evaluate_vrf": "evaluation.vrf",
    "export_classifier": "models.classifier",
    "export_onnx": "models.onnx",
    "fit_conformal": "calibration.conformal",
    "fit_density": "calibration.density",
    "fit_temperature": "calibration.temperature",
    "fit_vrf": "calibration.vrf",
    "greedy_soup": "models.merging",
    "interpolate": "models.merging",
    "learning_curves": "evaluation.curves",
    "load_clip_checkpoint": "models.convert",
    "load_ece": "metric",
    "load_suite": "suites.load",
    "model_stock": "models.model_stock",
    "pipeline": "models.pipeline",
    "reliability_diagram": "evaluation.plots",
    "unbake_temperature": "calibration.record",
    "uniform_soup": "models.merging",
}

if TYPE_CHECKING:
    from .calibration.conformal import ConformalSets, fit_conformal
    from .calibration.density import DensityCalibrator, fit_density
    from .calibration.estimate import estimate_accuracy
    from .calibration.metrics import calibration_metrics
    from .calibration.record import bake_temperature, unbake_temperature
    from .calibration.temperature import fit_temperature
    from .calibration.vrf import VRF, fit_vrf
    from .data.shift_set import ShiftSet
    from .data.suite import ShiftSuite
    from .evaluation.compare import Comparison, compare
    from .evaluation.curves import learning_curves
    from .evaluation.evaluation import Evaluation
    from .evaluation.evaluator import Evaluator
    from .evaluation.plots import confidence_histogram, reliability_diagram
    from .evaluation.vrf import evaluate_vrf
    from .metric import load_ece
    from .models.classifier import CLIPClassifier, export_classifier
    from .models.convert import clip_from_state_dict, load_clip_checkpoint
    from .models.merging import alpha_sweep, greedy_soup, interpolate, uniform_soup
    from .models.model_stock import model_stock
    from .models.onnx import export_onnx
    from .models.pipeline import CalibratedZeroShotPipeline, pipeline
    from .suites.load import load_suite
    from .teacher.average import Teacher
    from .teacher.callback import TeacherCallback
    from .trainer import CaRotTrainer
    from .training_args import CaRotTrainingArguments

__all__ = [
    "VRF",
    "CLIPClassifier",
    "CaRotTrainer",
    "CaRotTrainingArguments",
    "CalibratedZeroShotPipeline",
    "Comparison",
    "ConformalSets",
    "DensityCalibrator",
    "Evaluation",
    "Evaluator",
    "ShiftSet",
    "ShiftSuite",
    "Teacher",
    "TeacherCallback",
    "__version__",
    "alpha_sweep",
    "bake_temperature",
    "calibration_metrics",
    "clip_from_state_dict",
    "compare",
    "confidence_histogram",
    "estimate_accuracy",
    "evaluate_vrf",
    "export_classifier",
    "export_onnx",
    "fit_conformal",
    "fit_density",
    "fit_temperature",
    "fit_vrf",
    "greedy_soup",
    "interpolate",
    "learning_curves",
    "load_clip_checkpoint",
    "load_ece",
    "load_suite",
    "model_stock",
    "pipeline",
    "reliability_diagram",
    "unbake_temperature",
    "uniform_soup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
