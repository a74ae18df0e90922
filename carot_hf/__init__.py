"""Fine-tune CLIP so that it stays robust and calibrated when the data shift."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CaRotTrainer": "trainer",
    "CaRotTrainingArguments": "training_args",
    "ShiftSet": "suites",
    "ShiftSuite": "suites",
    "Teacher": "teacher",
    "TeacherCallback": "callbacks",
    "bake_temperature": "calibration",
    "calibration_metrics": "calibration",
    "confidence_histogram": "plots",
    "fit_temperature": "calibration",
    "load_ece": "metric",
    "load_suite": "suites",
    "reliability_diagram": "plots",
    "unbake_temperature": "calibration",
}

if TYPE_CHECKING:
    from .calibration import bake_temperature, calibration_metrics, fit_temperature, unbake_temperature
    from .callbacks import TeacherCallback
    from .metric import load_ece
    from .plots import confidence_histogram, reliability_diagram
    from .suites import ShiftSet, ShiftSuite, load_suite
    from .teacher import Teacher
    from .trainer import CaRotTrainer
    from .training_args import CaRotTrainingArguments

__all__ = [
    "CaRotTrainer",
    "CaRotTrainingArguments",
    "ShiftSet",
    "ShiftSuite",
    "Teacher",
    "TeacherCallback",
    "__version__",
    "bake_temperature",
    "calibration_metrics",
    "confidence_histogram",
    "fit_temperature",
    "load_ece",
    "load_suite",
    "reliability_diagram",
    "unbake_temperature",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
