"""The card of a pushed model: what it was trained on, how well it is calibrated and where, and how to make it again."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TAGS = ("carot_hf", "clip", "calibration", "robustness", "distribution-shift")
ZERO_SHOT, CLASSIFICATION = "zero-shot-image-classification", "image-classification"
_NAMES = {"accuracy": "Accuracy", "ece": "Expected calibration error", "nll": "Negative log-likelihood"}
_SHOWN_TEMPLATES = 5
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
        metrics: Of the latest evaluation of the whole suite, ``<set>_<metric>``; ``<set>_ece_ts`` with the temperature.
        baked: Whether the temperature was in the weights at that evaluation; the metrics then have no other column.
        calibration: ``config.calibration``; ``None``: no temperature is in the weights.
        templates: Captions with ``{}`` for the class name.
        classes: How many there are.
        arguments: Training arguments that are not the defaults.
        versions: Of the packages.
        seed: Of the run.
        objective: "contrastive" or "cross_entropy".
        command: That made it; ``None`` in a notebook.
        base_model: What was fine-tuned; an id of the Hub, or ``None`` if it has none.
        license: Of the weights.
        diagram: File name of the reliability diagrams beside the card.
        language: Of the captions.
        datasets: Ids of the Hub.
        tags: Beside ours.
        suite_version: Of the suite, if it has one.
        suite_hash: :attr:`~carot_hf.ShiftSuite.content_hash`.
    """

    name: str
    task: str
    suite: str
    sets: Mapping[str, str]
    metrics: Mapping[str, float]
    baked: bool
    calibration: Mapping[str, Any] | None
    templates: Sequence[str]
    classes: int
    arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int
    objective: str = "contrastive"
    command: str | None = None
    base_model: str | None = None
    license: str | None = None
    diagram: str | None = None
    language: str | None = None
    datasets: Sequence[str] = field(default_factory=tuple)
    tags: Sequence[str] = field(default_factory=tuple)
    suite_version: str | None = None
    suite_hash: str | None = None


def model_card(facts: CardFacts) -> ModelCard:
    """Write the card: metadata with a result for each set and metric, as the weights give it, and the text."""
    data = ModelCardData(
        model_name=facts.name,
        library_name="transformers",
        pipeline_tag=facts.task,
        license=facts.license,
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        metrics=["accuracy", "carot_hf/ece"],
        tags=list(dict.fromkeys([*TAGS, *facts.tags])),
        language=facts.language,
        eval_results=_results(facts) or None,
        ignore_metadata_errors=False,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(facts)}")


def versions() -> dict[str, str]:
    """Of the packages that matter, and of Python."""
    found = {}
    for name in ("carot_hf", "torch", "transformers", "datasets", "accelerate", "evaluate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "Python": platform.python_version()}


def command_line(argv: Sequence[str]) -> str | None:
    """The command that runs, if it is a script's; without the values of options called token, and without folders.

    Args:
        argv: As ``sys.argv``.
    """
    if not argv or not argv[0].endswith(".py"):
        return None
    words, hidden = [], False
    for word in argv[1:]:
        option, equals, _ = word.partition("=")
        if hidden and not word.startswith("--"):
            words.append("...")
            hidden = False
            continue
        hidden = option.startswith("--") and option.endswith("token") and not equals
        secret = option.startswith("--") and option.endswith("token") and bool(equals)
        words.append(f"{option}=..." if secret else word)
    return shlex.join(["python", Path(argv[0]).name, *words])


def _results(facts: CardFacts) -> list[EvalResult]:
    """One for each set and metric, as the published weights give it: with the temperature, if it is in them."""
    ending = "_ts" if facts.calibration is not None and not facts.baked else ""
    results = []
    for name in facts.sets:
        for metric, title in _NAMES.items():
            value = facts.metrics.get(f"{name}_{metric}{'' if metric == 'accuracy' else ending}")
            if value is not None:
                results.append(
                    EvalResult(
                        task_type=facts.task,
                        dataset_type=facts.suite,
                        dataset_name=name,
                        dataset_config=name,  # the metadata would else take all sets for one
                        dataset_split="test",
                        dataset_revision=facts.suite_hash,
                        metric_type=metric,
                        metric_name=title,
                        metric_value=round(float(value), 6),
                    )
                )
    return results


def _text(facts: CardFacts) -> str:
    parts = [f"# {facts.name}", _summary(facts), "## Results", _table(facts)]
    if facts.diagram is not None:
        parts.append(f"![Reliability diagrams of each set]({facts.diagram})")
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
    start = f"`{facts.base_model}`" if facts.base_model else "a CLIP checkpoint"
    trained = "CLIP's contrastive loss" if facts.objective == "contrastive" else "a linear head and cross-entropy"
    return (
        f"{start[0].upper()}{start[1:]}, fine-tuned on the suite `{facts.suite}` ({facts.classes:,} classes) with "
        f"{trained}, by carot_hf. It needs transformers only."
    )


def _table(facts: CardFacts) -> str:
    scaled = any(f"{name}_ece_ts" in facts.metrics for name in facts.sets)
    plain = "ECE, T in the weights" if facts.baked else "ECE without T"
    titles = ["set", "", "accuracy", plain, *(["ECE with T", "NLL with T"] if scaled else ["NLL"])]
    keys = ["accuracy", "ece", *(["ece_ts", "nll_ts"] if scaled else ["nll"])]
    rows = [
        [name, kind, *(_number(facts.metrics.get(f"{name}_{key}")) for key in keys)]
        for name, kind in facts.sets.items()
    ]
    if not any(f"{name}_accuracy" in facts.metrics for name in facts.sets):
        return "The model was not evaluated before it was pushed."
    lines = ["| " + " | ".join(row) + " |" for row in (titles, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(titles), *lines[1:]]) + (
        "\n\nECE is the expected calibration error of the whole set, equal-width bins of the top-label confidence; "
        "0 is calibrated. Fractions, not per cent; NLL in nats."
    )


def _temperature(facts: CardFacts) -> str:
    record = facts.calibration
    if record is None:
        return "No temperature is in the weights: the probabilities are as trained."
    where = "logit_scale" if facts.task == ZERO_SHOT else "the head"
    return (
        f"T = {record['temperature']:.4f}, fitted on the split `{record.get('split')}` ({record.get('n'):,} images, "
        f"criterion {record.get('criterion')}), which is held out of training and of the table. It is part of the "
        f"weights ({where}): the stock pipeline gives the calibrated probabilities. Accuracy does not change."
    )


def _use(facts: CardFacts) -> str:
    template = facts.templates[0]
    labels = ', candidate_labels=["...", "..."], hypothesis_template=' + repr(template)
    call = f'classify("image.jpg"{labels if facts.task == ZERO_SHOT else ""})'
    code = f'from transformers import pipeline\n\nclassify = pipeline("{facts.task}", model="{facts.name}")\n{call}'
    shown = "\n".join(f"- `{text}`" for text in facts.templates[:_SHOWN_TEMPLATES])
    rest = len(facts.templates) - _SHOWN_TEMPLATES
    more = f"\n- and {rest} more, in `config.json`" if rest > 0 else ""
    return f"```python\n{code}\n```\n\nIt was evaluated with the mean over these captions:\n\n{shown}{more}"


def _limits(facts: CardFacts) -> str:
    lines = [
        f"Meant for images like those of the suite `{facts.suite}` and for research on shift and calibration.",
        "The temperature is fitted at home: under shift, on other classes and with other captions the probabilities "
        "are less calibrated; the table says by how much on the sets that were tried.",
        "It inherits the biases of its base model and of its training images. Not for decisions about people.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _reproduction(facts: CardFacts) -> str:
    parts = []
    if facts.command:
        parts.append(f"```bash\n{facts.command}\n```")
    options = "\n".join(f"| `{name}` | `{value}` |" for name, value in facts.arguments.items())
    if options:
        parts.append(f"| argument | value |\n|---|---|\n{options}")
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    parts.append(f"Seed {facts.seed}; {versions}.")
    if facts.suite_hash:
        number = f" version {facts.suite_version}" if facts.suite_version else ""
        parts.append(f"Suite `{facts.suite}`{number}, sha256 `{facts.suite_hash}` (`suite.content_hash`).")
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
