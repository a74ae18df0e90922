"""Calibration errors as a metric of Hugging Face evaluate.

    metric = evaluate.load("carot_hf/ece")  # from the root of the repository; carot_hf.load_ece() from anywhere
    metric.compute(predictions=probabilities, references=labels)["ece"]

Rows are reduced to a confidence and a hit as they come, and never pass through Arrow: 50,000 x 1000 float32 takes
well under a second and a few MB. The file stands alone with the siblings it imports; evaluate copies these along.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import Any

import datasets
import evaluate
import numpy as np

from .binning import CalibrationBins, NothingCountsError, calibration_bins
from .inputs import ROW_OPTIONS, Options
from .rows import ROWS_KEPT, ReducedRows, RowBuffer, reduce_rows
from .uncertainty import debiased_ece, ece_interval

_DESCRIPTION = """\
Expected calibration error (ECE) of a classifier, with its relatives: how far the confidence of the predictions is
from the share of them that is right.
"""
_CITATION = """\
@inproceedings{guo2017calibration,
  title     = {On Calibration of Modern Neural Networks},
  author    = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {International Conference on Machine Learning},
  year      = {2017}
}
@inproceedings{naeini2015obtaining,
  title     = {Obtaining Well Calibrated Probabilities Using {Bayesian} Binning},
  author    = {Naeini, Mahdi Pakdaman and Cooper, Gregory F. and Hauskrecht, Milos},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year      = {2015}
}
"""
_INPUTS = """
Inputs:
    predictions: (N, K) probabilities, or logits with from_logits=True; (N,) confidences with mode="top_label";
        (N,) probabilities of class 1 with mode="positive". numpy, torch on any device, or lists.
    references: (N,) class indices in [0, K); for 1-D predictions 0/1 hits ("top_label") or labels ("positive").
    sample_weight: (N,) weights >= 0, e.g. importance weights; left out: 1 each.

Example:
    >>> metric = evaluate.load("carot_hf/ece")
    >>> rows = [[0.6, 0.2, 0.2], [0.0, 0.95, 0.05], [0.7, 0.1, 0.2]]
    >>> round(metric.compute(predictions=rows, references=[0, 1, 2])["ece"], 4)
    0.3833
"""
_NAMES = [field.name for field in fields(Options)]


class ECE(evaluate.Metric):
    """ECE, MCE, RMSCE, NLL and Brier score of class probabilities, confidences or logits.

    Every option may be given when the metric is loaded, and again in `compute`, which then takes precedence. With
    `add` and `add_batch` rows are reduced at once, so what acts on rows (``mode``, ``from_logits``, ``temperature``,
    ``check_sums``, ``classwise``, ``ignore_index``, and ``n_bins`` with ``classwise``) has to be known when the metric
    is loaded. From some million rows on only sums are kept, so that memory does not grow: then this holds for
    ``n_bins``, ``strategy`` and ``n_bootstrap`` as well, and the last two, given in time, keep the rows at 5 bytes
    each.

    Args:
        config_name: Name of a configuration, for evaluate only.
        n_bins: How many bins to make.
        strategy: ``"uniform"``: bins of equal width. ``"quantile"``: of equal mass as far as ties allow; equal
            confidences share a bin, so there may be fewer.
        mode: What 1-D predictions are: ``"top_label"`` confidences with 0/1 hits, or ``"positive"`` probabilities
            of class 1 with 0/1 labels. Rows of class scores need none.
        from_logits: The predictions are logits; take a softmax. Never guessed.
        temperature: Divides the logits; > 0.
        bins: Also return the table under ``"bins"``.
        classwise: Also return ``classwise_ece``, on ``n_bins`` uniform bins.
        check_sums: Refuse rows that do not sum to 1.
        n_bootstrap: Draws for the interval, the floor and the p-value; 0 for none of them. 1000 is a good number.
        confidence_level: Of the interval.
        seed: Of the draws.
        ignore_index: Label of rows that are left out.
        evaluate_options: ``keep_in_memory``, ``cache_dir``, ``experiment_id`` and so on, as for any metric.

    Raises:
        TypeError: If an option does not exist.
        ValueError: If an option is out of range, or ``num_process`` is not 1.
    """

    def __init__(
        self,
        config_name: str | None = None,
        *,
        n_bins: int = 10,
        strategy: str = "uniform",
        mode: str | None = None,
        from_logits: bool = False,
        temperature: float | None = None,
        bins: bool = False,
        classwise: bool = False,
        check_sums: bool = True,
        n_bootstrap: int = 0,
        confidence_level: float = 0.95,
        seed: int = 0,
        ignore_index: int | None = None,
        **evaluate_options: Any,
    ) -> None:
        self.options = Options(**{name: value for name, value in locals().items() if name in _NAMES})
        # Workaround, evaluate 0.4.6: it swallows options that nobody knows, so that a misspelt one would be ignored.
        # Until: it refuses them.
        known = inspect.signature(evaluate.EvaluationModule.__init__).parameters
        for name in evaluate_options.keys() - known.keys():
            raise TypeError(
                f"Expected options among {_NAMES} or those of evaluate, got {name!r}. Correct the spelling."
            )
        # Workaround, evaluate 0.4.6: processes meet through Arrow files, which our rows never enter. Until: a metric
        # may say how its parts are joined.
        if evaluate_options.get("num_process", 1) != 1:
            raise ValueError(
                f"Expected `num_process` to be 1, got {evaluate_options['num_process']}. "
                "Gather predictions and references (`accelerator.gather_for_metrics`) and compute on one process."
            )
        super().__init__(config_name=config_name, seed=seed, **evaluate_options)
        self._buffer: RowBuffer | None = None

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.List(datasets.Value("float64")), "references": label}),
                datasets.Features({"predictions": datasets.Value("float64"), "references": label}),
            ],
            reference_urls=["https://arxiv.org/abs/1706.04599"],
        )

    def __len__(self) -> int:
        """Rows added since the last `compute`."""
        return 0 if self._buffer is None else len(self._buffer)

    def add_batch(self, *, predictions: Any = None, references: Any = None, sample_weight: Any = None) -> None:
        """Check and reduce a batch of rows at once; nothing is kept of it if it is refused.

        A batch of which no row counts adds nothing.
        """
        with suppress(NothingCountsError):
            self._append(reduce_rows(*_both(predictions, references), self.options, sample_weight))

    def add(self, *, prediction: Any = None, reference: Any = None, sample_weight: float | None = None) -> None:
        """Check and reduce one row, ``(K,)`` scores or one number; batches are much faster."""
        prediction, reference = _both(prediction, reference)
        rows = prediction[None] if hasattr(prediction, "shape") else [prediction]
        self.add_batch(
            predictions=rows, references=[reference], sample_weight=None if sample_weight is None else [sample_weight]
        )

    def compute(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        sample_weight: Any = None,
        n_bins: int | None = None,
        strategy: str | None = None,
        mode: str | None = None,
        from_logits: bool | None = None,
        temperature: float | None = None,
        bins: bool | None = None,
        classwise: bool | None = None,
        check_sums: bool | None = None,
        n_bootstrap: int | None = None,
        confidence_level: float | None = None,
        seed: int | None = None,
        ignore_index: int | None = None,
    ) -> dict[str, Any]:
        """Calibration errors of these rows and of all rows added before; the metric is empty afterwards.

        Options are those of the class; None stands for what was given when the metric was loaded. With
        ``sample_weight`` every mean is by weight: a row of weight 2 counts as two, one of weight 0 not at all. What
        says how far to trust it, ``ece_debiased`` and what ``n_bootstrap`` gives, takes weights as fixed: a row of
        weight 2 is one row.

        Returns:
            Python numbers; errors are fractions, never percent:

            - ``ece``, ``rmsce``, ``mce``: mean, root mean square and maximum over the bins of the distance between
              accuracy and mean confidence, the first two weighted by the rows of the bin.
            - ``ece_debiased``: ECE less its bias (the normal approximation of Kumar et al. 2019 for the L1 error in
              closed form, on the same bins); may be just below 0.
            - ``adaptive_ece``: ECE on ``n_bins`` bins of equal mass (Nguyen and O'Connor 2015).
            - ``accuracy``, ``avg_confidence``, and ``overconfidence``, their signed difference: confidence - accuracy.
            - ``positive_rate`` with ``mode="positive"``: the share of class 1, which until the next minor version
              stands under ``accuracy``, too.
            - ``n``, ``n_bins``: rows that count, and bins that were made.
            - ``nll``, ``brier``: for ``(N, K)`` input; the Brier score is summed over the classes, in [0, 2]. With
              ``mode="positive"`` those of the probabilities: means of ``-ln p`` or ``-ln(1 - p)``, and of
              ``(p - y)^2`` in [0, 1]. ``nll`` is infinite where a label was given the probability 0.
            - ``classwise_ece`` with ``classwise``: mean over the classes of the ECE of their probabilities.
            - ``ece_low``, ``ece_high``, ``ece_floor``, ``p_value`` with ``n_bootstrap``: see `ece_interval`.
            - ``bins`` with ``bins``: lists ``edges``, ``count``, ``accuracy``, ``confidence``, ``gap`` (nan: empty).

        Raises:
            ValueError: If an input or an option is not as described; rows added before are kept.
            RuntimeError: If an option comes too late for the rows that were added before.
        """
        given = {name: value for name, value in locals().items() if name in _NAMES and value is not None}
        return self._result(predictions, references, sample_weight, replace(self.options, **given))

    def _result(self, predictions: Any, references: Any, sample_weight: Any, options: Options) -> dict[str, Any]:
        self._check_in_time(options)
        rows = None
        if predictions is not None or references is not None:
            rows = reduce_rows(*_both(predictions, references), options, sample_weight)
            self._check_in_time(options, rows.n)
        if self._buffer is None:
            if rows is None:
                raise ValueError("Expected at least one row, got none. Pass predictions and references, or add them.")
            return _measure(rows, options)
        if rows is not None:
            self._append(rows)
        result = _measure_buffer(self._buffer, options)
        self._buffer = None
        return result

    def _append(self, rows: ReducedRows) -> None:
        if self._buffer is None:
            keep_all = self.options.n_bootstrap > 0 or self.options.strategy != "uniform"
            self._buffer = RowBuffer(rows, self.options.n_bins, None if keep_all else ROWS_KEPT)
        else:
            self._buffer.append(rows)

    def _check_in_time(self, options: Options, n_more: int = 0) -> None:
        if self._buffer is None:
            return
        before, now = asdict(self.options), asdict(options)
        for name in (*ROW_OPTIONS, *(("n_bins",) if self.options.classwise else ())):
            if before[name] != now[name]:
                raise RuntimeError(
                    f"Expected `{name}` before the first row, got {name}={now[name]!r} after {len(self)} rows were "
                    f"reduced with {name}={before[name]!r}. Give it when loading the metric: load(..., {name}=...)."
                )
        for name in ("n_bins", "strategy", "n_bootstrap"):
            if self._buffer.folds(n_more) and before[name] != now[name]:
                raise RuntimeError(
                    f"Expected `{name}` before the first of more than {ROWS_KEPT:,} rows, got {name}={now[name]!r} "
                    f"with {len(self) + n_more:,} rows that are summed up with {name}={before[name]!r}. "
                    f"Give it when loading the metric: load(..., {name}=...)."
                )


def _both(predictions: Any, references: Any) -> tuple[Any, Any]:
    """Both as they are, unless one is missing."""
    for name, value in (("predictions", predictions), ("references", references)):
        if value is None:
            raise ValueError(f"Expected predictions and references, got no {name}. Pass both, by name.")
    return predictions, references


def _measure(rows: ReducedRows, options: Options) -> dict[str, Any]:
    """All numbers that `options` asks for."""
    kept, weights = (rows.confidences, rows.correct), rows.weights
    bins = calibration_bins(*kept, options.n_bins, options.strategy, sample_weight=weights)
    adaptive_ece = calibration_bins(*kept, options.n_bins, "quantile", sample_weight=weights).ece
    result = _numbers(bins, adaptive_ece, rows, options)
    if options.n_bootstrap:
        result |= ece_interval(
            *kept,
            bins,
            n_bootstrap=options.n_bootstrap,
            confidence_level=options.confidence_level,
            seed=options.seed,
            sample_weight=weights,
        )
    return result


def _measure_buffer(buffer: RowBuffer, options: Options) -> dict[str, Any]:
    """`_measure` of rows that were added, kept or not."""
    if not buffer.folds():
        return _measure(buffer.rows(), options)
    sums = buffer.bins()
    return _numbers(sums.bins(), sums.adaptive_ece(), buffer.totals, options)


def _numbers(bins: CalibrationBins, adaptive_ece: float, rows: ReducedRows, options: Options) -> dict[str, Any]:
    """What does not need the rows themselves; of `rows` only the sums are read."""
    result: dict[str, Any] = {
        "ece": bins.ece,
        "mce": bins.mce,
        "rmsce": bins.rmsce,
        "ece_debiased": debiased_ece(bins),
        "adaptive_ece": adaptive_ece,
        "accuracy": bins.avg_accuracy,
        "avg_confidence": bins.avg_confidence,
        "overconfidence": bins.overconfidence,
        "n": bins.n,
        "n_bins": bins.n_bins,
    }
    if rows.n_classes is not None or options.mode == "positive":
        result |= {"nll": rows.nll / rows.mass, "brier": rows.brier / rows.mass}
    if options.mode == "positive":
        result["positive_rate"] = bins.avg_accuracy
    if rows.n_classes is not None and rows.class_sums is not None:
        result["classwise_ece"] = float(np.abs(rows.class_sums).sum() / (rows.mass * rows.n_classes))
    if options.bins:
        result["bins"] = bins.to_dict()
    return result
