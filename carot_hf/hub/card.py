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

from ..basics.escape import code, markdown, printable, printable_lines, sentence
from ..basics.redaction import public_words

TAGS = ("carot_hf", "clip", "calibration", "robustness", "distribution-shift")
ZERO_SHOT, CLASSIFICATION = "zero-shot-image-classification", "image-classification"
_NAMES = {"accuracy": "Accuracy", "ece": "Expected calibration error", "nll": "Negative log-likelihood"}
TEACHER_FOLDER = "teacher"
_SHOWN_CLASSES = 10
_SAME_TEMPERATURE = 0.01  # relative; evaluation and calibration fit the same split
_CITATION = """@inproceedings{oh2023carot,
  title     = {Towards Calibrated Robust Fine-Tuning of Vision-Language Models},
  author    = {Oh, Changdae and Kim, Mijoo and Lim, Hyesu and Park, Junhyeok and Jeong, Euiseog and Cheng, Zhi-Qi and
               Song, Kyungwoo},
  booktitle = {NeurIPS 2023 Workshop on Distribution Shifts},
  year      = {2023}
}"""


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
        objective: "contrastive" or "cross_entropy".
        command: That made it; ``None`` in a notebook.
        repo: Id on the Hub; ``None``: as ``name``.
        base_model: What was fine-tuned; an id of the Hub, or ``None`` if it has none.
        license: Of the weights.
        diagram: File name of the reliability diagrams beside the card.
        teacher: Whether the teacher's weights are in the folder ``teacher``.
        language: Of the captions.
        datasets: Ids of the Hub.
        tags: Beside ours.
        suite_version: Of the suite, if it has one.
        suite_hash: :attr:`~carot_hf.ShiftSuite.content_hash`.
        changes: What was another from a step on, a sentence each.
        chosen_by: The metric of the test set that chose these weights; ``None``: none did.
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
    objective: str = "contrastive"
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


def model_card(facts: CardFacts) -> ModelCard:
    """Write the card: metadata with a result for each set and metric, as the weights give it, and the text."""
    data = ModelCardData(
        model_name=printable(facts.name),
        library_name="transformers" if facts.task == ZERO_SHOT else "carot_hf",  # whose class the model is
        pipeline_tag=facts.task,
        license=_shown(facts.license),
        base_model=_shown(facts.base_model),
        datasets=list(map(printable, facts.datasets)) or None,
        metrics=["accuracy", "carot_hf/ece"],
        tags=list(dict.fromkeys([*TAGS, *map(printable, facts.tags)])),
        language=_shown(facts.language),
        eval_results=_results(facts) or None,
        ignore_metadata_errors=False,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(facts)}")


def _shown(text: str | None) -> str | None:
    return None if text is None else printable(text)


def command_line(argv: Sequence[str]) -> str | None:
    """The command that runs, if it is a script's, as :mod:`carot_hf.basics.redaction` makes it public.

    Args:
        argv: As ``sys.argv``.
    """
    if not argv or not argv[0].endswith(".py"):
        return None
    return shlex.join(["python", Path(argv[0]).name, *public_words(argv[1:])])


def _published(facts: CardFacts) -> str | None:
    """Ending of the metrics that the published weights give; ``None``: they hold another temperature."""
    if facts.calibration is None:
        return ""
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
                        dataset_type=printable(facts.suite),
                        dataset_name=printable(name),
                        dataset_config=printable(name),  # the metadata would else take all sets for one
                        dataset_split="test",
                        dataset_revision=facts.suite_hash,
                        metric_type=metric,
                        metric_name=title,
                        metric_value=round(float(value), 6),
                    )
                )
    return results


def _text(facts: CardFacts) -> str:
    parts = [f"# {markdown(facts.name)}", _summary(facts), "## Results", _table(facts)]
    if facts.diagram is not None:
        parts.append(f"![Reliability diagrams of each set]({quote(facts.diagram)})")
    parts += [
        "## Temperature",
        _temperature(facts),
        "## Use",
        _use(facts),
        "## Intended use and limits",
        _limits(facts),
    ]
    parts += ["## How to make it again", _reproduction(facts), "## Citation", f"```bibtex\n{_CITATION}\n```"]
    return "\n\n".join(parts) + "\n"


def _summary(facts: CardFacts) -> str:
    start = code(facts.base_model) if facts.base_model else "A CLIP checkpoint"
    trained = "CLIP's contrastive loss" if facts.objective == "contrastive" else "a linear head and cross-entropy"
    done = (
        f"fine-tuned on the suite {code(facts.suite)} ({len(facts.class_names):,} classes) with {trained}, by carot_hf."
    )
    if facts.steps == 0:
        done = (
            f"as it was loaded: this run trained nothing. It was prepared for the suite {code(facts.suite)} "
            f"({len(facts.class_names):,} classes) by carot_hf."
        )
    needs = "transformers only" if facts.task == ZERO_SHOT else "transformers and carot_hf, which has its class"
    teacher = f" `{TEACHER_FOLDER}/` holds the teacher of the training, uncalibrated." if facts.teacher else ""
    return f"{start}, {done} It needs {needs}.{teacher}"


def _table(facts: CardFacts) -> str:
    names = [name for name in facts.sets if f"{name}_accuracy" in facts.metrics]
    if not names:
        return "**These weights were not evaluated** before they were pushed: nothing is known of them here."
    other = _published(facts) is None
    scaled = not other and any(f"{name}_ece_ts" in facts.metrics for name in names)
    columns = {"accuracy": "accuracy", "ECE without T": "ece", "NLL without T": "nll"}
    if scaled:
        columns |= {"ECE with T": "ece_ts", "NLL with T": "nll_ts"}
    kinds = {name: facts.sets[name] for name in names}
    if "ood_accuracy" in facts.metrics:
        kinds["ood"] = "mean of shifted"
    titles = ["set", "", *columns]
    rows = [
        [
            "" if name == "ood" else markdown(name),
            markdown(kind),
            *(_number(facts.metrics.get(f"{name}_{key}")) for key in columns.values()),
        ]
        for name, kind in kinds.items()
    ]
    lines = ["| " + " | ".join(row) + " |" for row in (titles, *rows)]
    table = "\n".join([lines[0], "|" + "---|" * len(titles), *lines[1:]])
    notes = [
        f"ECE is the expected calibration error of the whole set, {facts.n_bins} bins of equal width of the top-label "
        "confidence; 0 is calibrated. Fractions, not per cent; NLL in nats."
    ]
    if facts.chosen_by is not None:
        notes.append(
            f"**These weights were chosen by {code(facts.chosen_by)}**, a figure of the test set: its figures here are "
            "too good."
        )
    if other:
        notes.append("ECE and NLL with the temperature that is in the weights were not measured.")
    elif scaled and facts.calibration is None:
        notes.append(f"T = {facts.temperature:.4f} was fitted by the evaluation; **it is not in these weights**.")
    worse = [name for name in names if facts.metrics.get(f"{name}_ece_ts", -1.0) > facts.metrics[f"{name}_ece"]]
    if scaled and worse:
        notes.append(f"**With T the ECE is larger than without** on: {', '.join(map(markdown, worse))}.")
    return "\n\n".join([table, *notes])


def _temperature(facts: CardFacts) -> str:
    record = facts.calibration
    if record is None:
        return "**No temperature is in the weights**: the probabilities are as trained, not calibrated."
    where = "logit_scale" if facts.task == ZERO_SHOT else "the head"
    fitted = "set by hand: no split is known that it was fitted on"
    if "split" in record and "n" in record:
        fitted = (
            f"fitted on the split {code(record['split'])} ({record['n']:,} images, criterion "
            f"{markdown(record.get('criterion'))}), "
            "which is held out of training and of the table"
        )
    if "bias" in record:
        return (
            f"T = {record['temperature']:.4f} and a bias of {record['bias']:.4f}, {fitted}. They are part of the "
            "weights (logit_scale, logit_bias): the stock pipeline gives sigmoid(z / T + bias) of each logit z without "
            "knowing. Accuracy does not change."
        )
    return (
        f"T = {record['temperature']:.4f}, {fitted}. It is part of the weights ({where}): the stock pipeline divides "
        "by it without knowing. Accuracy does not change."
    )


def _use(facts: CardFacts) -> str:
    model = json.dumps(facts.repo or facts.name)
    lines = f'from transformers import pipeline\n\nclassify = pipeline("{facts.task}", model={model})\n'
    captions = f"It was evaluated with {len(facts.templates)} captions a class"
    if facts.task == ZERO_SHOT:
        names = ", ".join(json.dumps(name, ensure_ascii=False) for name in facts.class_names[:_SHOWN_CLASSES])
        rest = len(facts.class_names) - _SHOWN_CLASSES
        lines += (
            f"labels = [{names}]{f'  # and {rest:,} more' if rest > 0 else ''}\n"
            f"template = {json.dumps(facts.templates[0], ensure_ascii=False)}\n"
            'classify("image.jpg", candidate_labels=labels, hypothesis_template=template)'
        )
        if len(facts.templates) > 1:
            captions += (
                ", whose embeddings are averaged. The pipeline takes one caption: its probabilities are near those of "
                "the table, not the same; `CaRotTrainer.export_classifier` gives those. The captions"
            )
    else:
        lines = f'import carot_hf  # makes the model\'s class known\n{lines}classify("image.jpg")'
        captions = "The head started from these captions"
    return "\n\n".join(
        [
            _fenced(lines, "python"),
            f"{captions}:",
            _fenced("\n".join(map(printable, facts.templates)), "text"),
            "<details><summary>Class names, in the order of the labels</summary>",
            _fenced("\n".join(json.dumps(name, ensure_ascii=False) for name in facts.class_names), "text"),
            "</details>",
        ]
    )


def _fenced(text: str, language: str) -> str:
    """A block of code whose fence is longer than any in the text, without control characters."""
    text = printable_lines(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _limits(facts: CardFacts) -> str:
    lines = [
        f"Meant for images like those of the suite {code(facts.suite)} and for research on shift and calibration.",
        "The temperature is fitted at home: under shift, on other classes and with other captions the probabilities "
        "are less calibrated; the table says by how much on the sets that were tried.",
        "It inherits the biases of its base model and of its training images. Not for decisions about people.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _reproduction(facts: CardFacts) -> str:
    parts = []
    if facts.command:
        parts.append(_fenced(facts.command, "bash"))
    options = "\n".join(f"| {code(name)} | {code(value)} |" for name, value in facts.arguments.items())
    if options:
        parts.append(f"| argument | value |\n|---|---|\n{options}")
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    processes = f"; {facts.processes} processes" if facts.processes > 1 else ""
    parts.append(f"{facts.steps:,} steps; seed {facts.seed}{processes}; {versions}.")
    if facts.changes:
        parts.append("\n".join(f"- {sentence(change)}" for change in facts.changes))
    if facts.suite_hash:
        number = f" version {markdown(facts.suite_version)}" if facts.suite_version else ""
        parts.append(f"Suite {code(facts.suite)}{number}, sha256 `{facts.suite_hash}` (`suite.content_hash`).")
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
