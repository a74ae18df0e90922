"""A checkpoint as it is, for commands that do not train: model, processor, calibrator, class names and captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

from ..basics.whole_file import whole_files
from ..calibration.density import DensityCalibrator
from ..calibration.record import calibration_record, needs_calibrator
from ..models.backbones import BACKBONES, embedding_size
from ..models.classifier import CLIPClassifier, check_tower
from ..models.convert import load_clip_checkpoint


class Loaded(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        model: In float32.
        processor: Its own.
        calibrator: That lies beside it; ``None``: there is none, or the model has it inside.
    """

    model: Any
    processor: Any
    calibrator: DensityCalibrator | None


def load(name: str, options: Any) -> Loaded:
    """Load a checkpoint with what calibrates it.

    Args:
        name: A folder, an id on the Hub, or a file of weights in the naming of OpenAI's CLIP.
        options: Those of :func:`~carot_hf.cli.data_options.add_model_options`.
    Raises:
        OSError: If there is no such model.
        ValueError: If it is of no family that is known, or the calibrator is of other weights.
    """
    chosen = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if Path(name).is_file():
        return _from_file(name, options, chosen)
    if options.processor or options.hidden_act:
        raise ValueError(f"Expected --processor and --hidden_act with a file of weights only, got {name}.")
    model = model_of(name).eval()
    processor = processor_of(name)
    record = calibration_record(model)
    own = getattr(model, "density", None)
    calibrator = DensityCalibrator.from_pretrained(name) if needs_calibrator(record) and own is None else None
    if calibrator is not None:
        check_tower(calibrator, model, embedding_size(model))
    return Loaded(model.to(chosen), processor, calibrator)


def model_of(name: str) -> Any:
    """Load the model alone, in float32: of a known family, or a classifier.

    Raises:
        OSError: If there is none.
        ValueError: If it is of another kind.
    """
    with _found(name):
        kind = AutoConfig.from_pretrained(name).model_type  # nosec B615  # JSON; no code is run
    if kind != "clip_classifier" and kind not in BACKBONES:
        raise ValueError(f"Expected a model of {sorted([*BACKBONES, 'clip_classifier'])}, got '{kind}' in {name}.")
    family: Any = CLIPClassifier if kind == "clip_classifier" else AutoModel
    with _found(name):
        return family.from_pretrained(name, dtype=torch.float32)


def processor_of(name: str) -> Any:
    """Load the processor of a checkpoint.

    Raises:
        OSError: If there is none.
        ValueError: If there is no such checkpoint.
    """
    with _found(name):
        return AutoProcessor.from_pretrained(name)  # nosec B615  # the user's choice; no code in it is run


@contextmanager
def _found(name: str) -> Iterator[None]:
    """Say of a name that is no folder here, and no model on the Hub, that it is neither.

    Raises:
        ValueError: If so.
    """
    wanted = f"Expected a folder with a model, or an id on the Hub, got {name}"
    if not Path(name).exists() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"{wanted}, which is not there.")
    try:
        yield
    except OSError as error:
        if Path(name).exists():
            raise
        raise ValueError(f"{wanted}: no folder here, and from the Hub: {error} Correct the name.") from error


def _from_file(name: str, options: Any, device: str) -> Loaded:
    """Load plain weights."""
    if not options.processor:
        raise ValueError(
            f"Expected --processor with {name}: weights do not say how text and images are read. For ViT-B/16 name "
            "openai/clip-vit-base-patch16."
        )
    model = load_clip_checkpoint(name, hidden_act=options.hidden_act)
    return Loaded(model.to(device), processor_of(options.processor), None)


def save(place: Path, model: Any, processor: Any, calibrator: DensityCalibrator | None = None) -> None:
    """Write a model with what belongs to it, all of it or nothing."""
    with whole_files(place) as beside:
        for part in (model, processor, calibrator):
            if part is not None:
                part.save_pretrained(beside)


def classes_of(loaded: Loaded, name: str) -> tuple[list[str], list[str]]:
    """Return the class names and the captions that a checkpoint was made for.

    Raises:
        ValueError: If it does not say so.
    """
    config, record = loaded.model.config, calibration_record(loaded.model) or {}
    if isinstance(loaded.model, CLIPClassifier):
        return [config.id2label[index] for index in range(config.num_labels)], []
    names, templates = record.get("classes"), record.get("templates")
    if not names or not templates:
        raise ValueError(
            f"Expected class names, but {Path(name).name} does not say which it was made for. Name a --suite, or "
            "--classes."
        )
    return list(map(str, names)), list(map(str, templates))


def check_classes(loaded: Loaded, names: Sequence[str]) -> None:
    """Refuse a classifier whose classes are not these, in this order: its head knows them by number alone.

    Raises:
        ValueError: As said.
    """
    if not isinstance(loaded.model, CLIPClassifier):
        return
    own = classes_of(loaded, "")[0]
    if own != list(names):
        raise ValueError(
            f"Expected the classes of the classifier in its order, {own[:3]} ... ({len(own)}), got "
            f"{list(names)[:3]} ... ({len(names)}). Its head knows them by number: name the suite of its "
            "training."
        )


def names_in(options: Mapping[str, Any]) -> tuple[list[str], list[str]] | None:
    """Return class names and captions of the command line; ``None``: there are none.

    Raises:
        ValueError: If one name is given, and it is no file.
    """
    given = options["classes"]
    if not given:
        return None
    if len(given) == 1 and not Path(given[0]).is_file():
        raise ValueError(f"Expected --classes as two names or more, or a file with a name a line, got {given[0]}.")
    names = Path(given[0]).read_text(encoding="utf-8").splitlines() if len(given) == 1 else list(given)
    return [name for name in names if name.strip()], list(options["templates"])
