"""The card of a pushed model: what it was trained on, how well it is calibrated and where, and how to make it again."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__

from ..basics.escape import code, markdown, printable, printable_lines, sentence, table, with_interval
from ..basics.redaction import public_words

TAGS = ("carot_hf", "clip", "calibration", "robustness", "distribution-shift")
ZERO_SHOT, CLASSIFICATION = "zero-shot-image-classification", "image-classification"
_NAMES = {"accuracy": "Accuracy", "ece": "Expected calibration error", "nll": "Negative log-likelihood"}
TEACHER_FOLDER = "teacher"
_SHOWN_CLASSES = 10
_MEASURED_AT = {"temperature": "_ts", "perturbed": "_pts", "density": "_dts"}  # where sets of an evaluation are made
_SAME_TEMPERATURE = 0.01  # relative; evaluation and calibration fit the same split


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        name: Of the model.
        task: Of the pipeline that runs it.
        suite: Name of the suite.
        sets: The test sets by name, "id" for the one of the training distribution or "shifted": the order of the table.
        metrics: Of an evaluation of these weights on the whole suite: ``<set>_<metric>`` without any temperature,
            ``<set>_ece_ts`` and ``<set>_nll_ts`` with one; ``ood`` is the mean over the shifted sets. Empty: none.
        temperature: The one of that evaluation.
        n_bins: Confidence bins of the ECE.
        calibration: ``config.calibration``; ``None``: no temperature is in the weights.
        templates: Captions with ``{}`` for the class name.
        class_names: In the order of the labels.
        steps: Optimizer steps of the run; 0: nothing was trained.
        arguments: Training arguments that are not the defaults.
        versions: Of the packages.
        seed: Of the run.
        processes: That trained together.
        preset: Whose loss it is; ``None``: of no preset.
        loss: Its terms with their weights, in words.
        teacher_words: How the teacher followed the student; ``None``: there was none.
        command: That made it; ``None`` in a notebook.
        repo: Id on the Hub; ``None``: as ``name``.
        base_model: What was fine-tuned: an id of the Hub; ``None``: not known.
        license: Of the weights; ``None``: not known.
        diagram: File name of the reliability diagrams beside the card.
        teacher: Whether the teacher's weights are in the folder ``teacher``.
        language: Of the captions.
        datasets: Data sets; the metadata hold those that may be ids of the Hub.
        tags: Beside ours.
        suite_version: Of the suite, if it has one.
        suite_hash: :attr:`~carot_hf.ShiftSuite.content_hash`.
        changes: What was another from a step on, a sentence each.
        chosen_by: The metric of the test set that chose these weights; ``None``: none did.
        intervals: By set 95 % intervals of "accuracy", "ece" and ``ece_<ending>``.
        marks: Sets that are no evidence for the calibration, and why.
    """

    name: str
    task: str
    suite: str
    sets: Mapping[str, str]
    metrics: Mapping[str, float]
    temperature: float | None
    n_bins: int
    calibration: Mapping[str, Any] | None
    templates: Sequence[str]
    class_names: Sequence[str]
    steps: int
    arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int
    processes: int = 1
    preset: str | None = None
    loss: str = ""
    teacher_words: str | None = None
    command: str | None = None
    repo: str | None = None
    base_model: str | None = None
    license: str | None = None
    diagram: str | None = None
    teacher: bool = False
    language: str | None = None
    datasets: Sequence[str] = field(default_factory=tuple)
    tags: Sequence[str] = field(default_factory=tuple)
    suite_version: str | None = None
    suite_hash: str | None = None
    changes: Sequence[str] = field(default_factory=tuple)
    chosen_by: str | None = None
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)


def model_card(facts: CardFacts) -> ModelCard:
    """Write the card: metadata with a result for each set and metric, as the weights give it, and the text."""
    data = ModelCardData(
        model_name=printable(facts.name),
        library_name="transformers" if facts.task == ZERO_SHOT else "carot_hf",  # whose class the model is
        pipeline_tag=facts.task,
        license=_shown(facts.license),
        base_model=next(iter(hub_ids([facts.base_model])), None),
        datasets=hub_ids(facts.datasets) or None,
        metrics=["accuracy"],  # of the others the Hub has no page
        tags=list(dict.fromkeys([*TAGS, *map(printable, facts.tags)])),
        language=_shown(facts.language),
        eval_results=_results(facts) or None,
        ignore_metadata_errors=False,
    )
    values: dict[str, Any] = {
        "facts": facts,
        "zero_shot": facts.task == ZERO_SHOT,
        "classes": f"{len(facts.class_names):,}",
        "made_of": _made_of(facts),
        "results": _table(facts),
        "sets": _conformal(facts),
        "alpha": next((kept["alpha"] for kept in (facts.calibration or {}).get("conformal", {}).values()), 0.0),
        "diagram": None if facts.diagram is None else quote(facts.diagram),
        "use": fenced(_use(facts), "python"),
        "options": table([["argument", "value"], *([code(n), code(value)] for n, value in facts.arguments.items())]),
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        "names": "\n".join(json.dumps(name, ensure_ascii=False) for name in facts.class_names),
        **{function.__name__: function for function in (code, fenced, markdown, sentence)},
    }
    card: ModelCard = ModelCard.from_template(data, str(Path(__file__).with_name("card.md")), **values)
    return card


def hub_ids(names: Sequence[str | None]) -> list[str]:
    """Those names that may be ids of the Hub: it refuses a card with others, or takes a path for somebody's."""
    found = []
    for name in names:
        try:
            validate_repo_id(name or "")
        except HFValidationError:
            continue
        found.append(str(name))
    return found


def _made_of(facts: CardFacts) -> str:
    """Base model, licence, data, loss and teacher; what is not known says so."""
    rows = {
        "base model": code(facts.base_model) if facts.base_model else "not known",
        "licence": markdown(facts.license) if facts.license else "not known; see that of the base model",
    }
    if facts.datasets:
        rows["data sets"] = ", ".join(map(code, facts.datasets))
    if facts.steps:
        rows["method"] = f"the loss of the preset {code(facts.preset)}" if facts.preset else "a loss of no preset"
        rows["loss"] = markdown(facts.loss)
        rows["teacher"] = "none" if facts.teacher_words is None else markdown(facts.teacher_words)
    return table([["", ""], *([name, text] for name, text in rows.items())])


def _shown(text: str | None) -> str | None:
    return None if text is None else printable(text)


def command_line(argv: Sequence[str]) -> str | None:
    """The command that runs, if it is ours or a script's, as :mod:`carot_hf.basics.redaction` makes it public.

    Args:
        argv: As ``sys.argv``.
    """
    place = Path(argv[0]) if argv else Path()
    if place.name == "carot_hf" or place.parts[-2:] == ("carot_hf", "__main__.py"):
        return shlex.join(["carot_hf", *public_words(argv[1:])])
    if place.suffix != ".py":
        return None
    return shlex.join(["python", place.name, *public_words(argv[1:])])


def _published(facts: CardFacts) -> str | None:
    """Ending of the metrics that the published weights give; ``None``: they hold another temperature."""
    if facts.calibration is None:
        return ""
    if facts.calibration.get("method") == "perturbed" and any(name.endswith("_ece_pts") for name in facts.metrics):
        return "_pts"
    baked, measured = float(facts.calibration["temperature"]), facts.temperature
    same = measured is not None and math.isclose(baked, measured, rel_tol=_SAME_TEMPERATURE)
    return "_ts" if same else None


def _results(facts: CardFacts) -> list[EvalResult]:
    """One for each set and metric, as the published weights give it: with the temperature, if it is in them."""
    ending = _published(facts)
    results = []
    for name in facts.sets:
        for metric, title in _NAMES.items():
            if metric != "accuracy" and ending is None:
                continue
            value = facts.metrics.get(f"{name}_{metric}{'' if metric == 'accuracy' else ending}")
            if value is not None and math.isfinite(value):
                results.append(
                    EvalResult(
                        task_type=facts.task,
                        # the spaces say that it is no id of a data set; another one for each, else all are one
                        dataset_type=f"{printable(name)} of the suite {printable(facts.suite)}",
                        dataset_name=printable(name),
                        metric_type=metric,
                        metric_name=title,
                        metric_value=round(float(value), 6),
                    )
                )
    return results


def _table(facts: CardFacts) -> str:
    names = [name for name in facts.sets if f"{name}_accuracy" in facts.metrics]
    if not names:
        return "**These weights were not evaluated** before they were pushed: nothing is known of them here."
    ending = _published(facts)
    other, end = ending is None, ending or "_ts"
    scaled = not other and any(f"{name}_ece{end}" in facts.metrics for name in names)
    columns = {"accuracy": "accuracy", "ECE without T": "ece", "NLL without T": "nll"}
    if scaled:
        columns |= {"ECE with T": f"ece{end}", "NLL with T": f"nll{end}"}
    if facts.calibration is not None and facts.calibration.get("method") == "density":
        columns |= {"ECE per image": "ece_dts", "NLL per image": "nll_dts"}
    kinds = {name: facts.sets[name] for name in names}
    if "ood_accuracy" in facts.metrics:
        kinds["ood"] = "mean of shifted"
    rows = [["set", "", *columns]]
    for name, kind in kinds.items():
        own = facts.intervals.get(name, {})
        numbers = (
            _number(facts.metrics.get(f"{name}_{key}")) + with_interval(own.get(key), 4) for key in columns.values()
        )
        mark = f" ({facts.marks[name]})" if name in facts.marks else ""
        rows.append(["" if name == "ood" else markdown(name), markdown(f"{kind}{mark}"), *numbers])
    notes = [
        f"ECE is the expected calibration error of the whole set, {facts.n_bins} bins of equal width of the top-label "
        "confidence; 0 is calibrated. Fractions, not per cent; NLL in nats; in parentheses 95 % intervals."
    ]
    if facts.marks:
        notes.append(
            "Sets marked as seen or as a target are no evidence for the calibration, which was fitted on their like: "
            "they stay out of the mean."
        )
    if (sure := (facts.calibration or {}).get("sure")) is not None:
        notes.append(
            f"With T, answers of a confidence of {sure:.4f} or more were right in 95 % of the held-out images."
        )
    if facts.chosen_by is not None:
        notes.append(
            f"**These weights were chosen by {code(facts.chosen_by)}**, a figure of the test set: its figures here are "
            "too good."
        )
    if other:
        notes.append("ECE and NLL with the temperature that is in the weights were not measured.")
    elif scaled and facts.calibration is None:
        notes.append(f"T = {facts.temperature:.4f} was fitted by the evaluation; **it is not in these weights**.")
    worse = [name for name in names if facts.metrics.get(f"{name}_ece{end}", -1.0) > facts.metrics[f"{name}_ece"]]
    if scaled and worse:
        notes.append(f"**With T the ECE is larger than without** on: {', '.join(map(markdown, worse))}.")
    return "\n\n".join([table(rows), *notes])


def _conformal(facts: CardFacts) -> str | None:
    """Coverage and size of the conformal sets that go with the weights; ``None``: there are none."""
    record = facts.calibration or {}
    last = next((end for end in ("_dts", "_pts") if any(key.endswith(end) for key in facts.metrics)), "_ts")
    same = record.get("conformal") and last == _MEASURED_AT.get(record.get("method", "temperature"))
    names = [name for name in facts.sets if same and f"{name}_aps_coverage" in facts.metrics]
    columns = {f"{score.upper()} {key}": f"{score}_{key}" for score in ("lac", "aps") for key in ("coverage", "size")}
    rows = [
        [markdown(name), *(_number(facts.metrics.get(f"{name}_{key}")) for key in columns.values())] for name in names
    ]
    return table([["set", *columns], *rows]) if names else None


def _use(facts: CardFacts) -> str:
    """A script that runs the model."""
    model = json.dumps(facts.repo or facts.name)
    start = f'from transformers import pipeline\n\nclassify = pipeline("{facts.task}", model={model})\n'
    if facts.task != ZERO_SHOT:
        return f'from carot_hf import CLIPClassifier  # makes the class known\n{start}classify("image.jpg")'
    names = ", ".join(json.dumps(name, ensure_ascii=False) for name in facts.class_names[:_SHOWN_CLASSES])
    rest = len(facts.class_names) - _SHOWN_CLASSES
    return (
        f"{start}labels = [{names}]{f'  # and {rest:,} more' if rest > 0 else ''}\n"
        f"template = {json.dumps(facts.templates[0], ensure_ascii=False)}\n"
        'classify("image.jpg", candidate_labels=labels, hypothesis_template=template)'
    )


def fenced(text: str, language: str) -> str:
    """A block of code whose fence is longer than any in the text, without control characters."""
    text = printable_lines(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
