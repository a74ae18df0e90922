"""Fine-tune CLIP so that it stays robust and calibrated when the data shift."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CLIPClassifier": "classifier",
    "CaRotTrainer": "trainer",
    "CaRotTrainingArguments": "training_args",
    "ShiftSet": "suites",
    "ShiftSuite": "suites",
    "Teacher": "teacher",
    "TeacherCallback": "callbacks",
    "alpha_sweep": "merging",
    "bake_temperature": "calibration",
    "calibration_metrics": "calibration",
    "clip_from_state_dict": "convert",
    "confidence_histogram": "plots",
    "export_classifier": "classifier",
    "export_onnx": "onnx_export",
    "fit_temperature": "calibration",
    "greedy_soup": "merging",
    "interpolate": "merging",
    "load_clip_checkpoint": "convert",
    "load_ece": "metric",
    "load_suite": "suites",
    "reliability_diagram": "plots",
    "unbake_temperature": "calibration",
    "uniform_soup": "merging",
}

if TYPE_CHECKING:
    from .calibration import bake_temperature, calibration_metrics, fit_temperature, unbake_temperature
    from .callbacks import TeacherCallback
    from .classifier import CLIPClassifier, export_classifier
    from .convert import clip_from_state_dict, load_clip_checkpoint
    from .merging import alpha_sweep, greedy_soup, interpolate, uniform_soup
    from .metric import load_ece
    from .onnx_export import export_onnx
    from .plots import confidence_histogram, reliability_diagram
    from .suites import ShiftSet, ShiftSuite, load_suite
    from .teacher import Teacher
    from .trainer import CaRotTrainer
    from .training_args import CaRotTrainingArguments

__all__ = [
    "CLIPClassifier",
    "CaRotTrainer",
    "CaRotTrainingArguments",
    "ShiftSet",
    "ShiftSuite",
    "Teacher",
    "TeacherCallback",
    "__version__",
    "alpha_sweep",
    "bake_temperature",
    "calibration_metrics",
    "clip_from_state_dict",
    "confidence_histogram",
    "export_classifier",
    "export_onnx",
    "fit_temperature",
    "greedy_soup",
    "interpolate",
    "load_clip_checkpoint",
    "load_ece",
    "load_suite",
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
