"""Suites by name: the embedded digits, ImageNet and its shifts, or a YAML file or a folder of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..basics.content_hash import sha256_of_array
from ..data.shift_set import ShiftSet
from ..data.suite import ShiftSuite
from . import digits


def load_suite(name_or_yaml: str | Path, **options: Any) -> ShiftSuite:
    """Load a suite.

    Args:
        name_or_yaml: ``"digits"``: real images of digits from installed packages, no network; a demonstration, not
            evidence for ImageNet. ``"imagenet"``: ImageNet-1K and its shifts from the Hub or from local copies.
            ``"pacs"``, ``"office-home"``, ``"domainnet"``, ``"camelyon17"``, ``"waterbirds"``, ``"cifar10"``, ...: see
            :func:`~carot_hf.suites.benchmarks.suite.benchmark_suite`. A path that ends in ``.yaml`` or ``.yml``: a
            suite of one's own, see `examples/suites/`. Any other path: a folder with test/, train/ and so on, see
            :func:`~carot_hf.suites.from_folder.suite_from_folder`. A folder that is called as one of the suites is
            named as ``digits/``: without a slash it is the suite of that name.
        **options: Those of :func:`~carot_hf.suites.imagenet.suite.imagenet_suite` (``root``, ``streaming``, ``shifts``,
            ...), of a benchmark (``root``, ``home``, ``held_out``, ...), or of
            :func:`~carot_hf.suites.from_yaml.suite_from_file` and a folder (``streaming``); ``digits`` has none.
    Raises:
        ValueError: If there is no such suite or option, or the data are not as described.
    """
    name = str(name_or_yaml)
    if name.endswith((".yaml", ".yml")):
        from .from_yaml import suite_from_file

        return suite_from_file(name, **_known(options, name, ("streaming",)))
    if name == "imagenet":
        from .imagenet.suite import OPTIONS, imagenet_suite

        return imagenet_suite(**_known(options, name, OPTIONS))
    if name == "digits":
        _known(options, name, ())
        return _digits_suite()
    from .benchmarks.table import REFUSED, benchmarks

    if name in REFUSED:
        raise ValueError(f"Expected a suite that can be measured, got {name!r}: {REFUSED[name]}.")
    if name in benchmarks():
        from .benchmarks.suite import OPTIONS as OF_BENCHMARKS
        from .benchmarks.suite import benchmark_suite

        return benchmark_suite(name, **_known(options, name, OF_BENCHMARKS))
    if Path(name).expanduser().is_dir():
        from .from_folder import suite_from_folder

        return suite_from_folder(name, **_known(options, name, ("streaming",)))
    raise ValueError(
        f"Expected 'digits', 'imagenet', a file .yaml, a folder or a benchmark out of {', '.join(benchmarks())}, got "
        f"{name!r}, which is none. Correct the path, describe data in a YAML file (see examples/suites/), or build a "
        "carot_hf.ShiftSuite of carot_hf.ShiftSet."
    )


def _known(options: dict[str, Any], suite: str, names: tuple[str, ...]) -> dict[str, Any]:
    unknown = sorted(set(options) - set(names))
    if unknown:
        known = f"options out of {sorted(names)}" if names else "no options"
        raise ValueError(f"Expected {known} for the suite '{suite}', got {unknown}. Leave them out.")
    return options


def _digits_suite() -> ShiftSuite:
    def shift_set(name: str, split: digits.DigitSplit) -> ShiftSet:
        return ShiftSet(
            split,
            name=name,
            num_classes=len(digits.CLASS_NAMES),
            labels=split.labels,
            content=sha256_of_array(split.images, "u1"),
        )

    splits = digits.fine_tuning_splits()
    return ShiftSuite(
        name="digits",
        class_names=list(digits.CLASS_NAMES),
        templates=list(digits.TEMPLATES),
        train=shift_set("train", splits["train"]),
        validation=shift_set("validation", splits["validation"]),
        test=shift_set("uci", splits["test"]),
        shifts={name: shift_set(name, split) for name, split in digits.shift_splits().items()},
        recommended={
            "learning_rate": 5e-4,
            "per_device_train_batch_size": 128,
            "num_train_epochs": 33,  # 33 x 6 = 198 optimizer steps
            "warmup_steps": 0.1,
            "teacher_update_every": 4,  # 1/50 of the run, as 500 of 25,030
            "logging_steps": 10,
            "save_steps": 50,
            "save_total_limit": 2,
        },
        version=digits.VERSION,
    )
