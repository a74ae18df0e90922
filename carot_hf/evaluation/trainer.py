"""EvaluatingTrainer: a ``transformers.Trainer`` that measures and calibrates on the sets of a suite.

It joins an :class:`~carot_hf.Evaluator` to Trainer's callbacks, logs and pictures.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize, speed_metrics
from transformers.utils import logging

from ..basics.escape import guarded
from ..calibration.density import DensityCalibrator
from ..calibration.metrics import read_set
from ..calibration.names import SPLIT
from ..calibration.record import calibrated_per_image, check_not_baked
from ..data.bad_images import BadImages
from ..data.captions import CaptionTable
from ..data.loaders import evaluation_loader, loader_options
from ..data.shift_set import ShiftSet
from ..data.suite import ShiftSuite, needed
from ..data.survey import say_positions
from ..data.transforms import image_transform
from ..ece.binning import CalibrationBins
from .curves import keep_curves
from .diagrams import can_draw, diagram_tables, diagrams_path, keep_diagrams, send_diagrams
from .embed import Embedder
from .evaluation import Reported
from .evaluator import Evaluator
from .memory import Memory
from .per_image import PerImage

logger = guarded(logging.get_logger(__name__))


class EvaluatingTrainer(Trainer, ABC):
    """A ``Trainer`` that evaluates on a suite; arguments as there, and ``suite``, ``captions``.

    Attributes:
        suite: The sets.
        captions: Its captions in the model's tokens.
        bins: Bin tables of the latest :meth:`evaluate` by set; ``bins_ts`` those with the fitted temperature,
            ``bins_pts`` and ``bins_dts`` those of the methods "perturbed" and "density".
        latest: The latest evaluation of the whole suite, for a card.
        latest_rows: What it says of each image, by set; empty: there is none of these weights.
    """

    args: Any
    model: Any
    control: Any
    compute_metrics: Any
    data_collator: Any
    suite: ShiftSuite
    captions: CaptionTable
    bad_images: BadImages

    def __init__(self, **kwargs: Any) -> None:
        self.bins: dict[str, CalibrationBins] = {}
        self.bins_ts: dict[str, CalibrationBins] = {}
        self.bins_pts: dict[str, CalibrationBins] = {}
        self.bins_dts: dict[str, CalibrationBins] = {}
        self._evaluated: nn.Module | None = None  # another model than the student, for a while
        self._drew_curves = False  # those in `output_dir` are of this trainer
        self.forget()
        super().__init__(**kwargs)

    def forget(self) -> None:
        """Forget what was measured: the weights will be others."""
        self.latest, self._memory = Reported(), Memory()
        self.latest_rows: Mapping[str, PerImage] = {}

    # ---- what a subclass says ----

    @abstractmethod
    def teacher_network(self) -> nn.Module:
        """The network of the teacher.

        Raises:
            ValueError: If there is none.
        """

    def training_set(self) -> ShiftSet | None:
        """The set that is trained on, if there is one."""
        return self.suite.train

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as ``Trainer`` does, then draw ``learning_curves.png`` where pictures are drawn; not of a search."""
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.draws() and self.hp_search_backend is None:
            goes_on = bool(resume_from_checkpoint) or self._drew_curves or self.args.overwrite_output_dir
            self._drew_curves = keep_curves(self.args.output_dir, self.state.log_history, goes_on=goes_on)
        return output

    # ---- sets ----

    def as_set(self, name: str, data: Any) -> ShiftSet:
        """Return a set of what somebody passed, its labels matched with the suite's classes."""
        made = ShiftSet.of(data, name=name, classes=self.suite.classes)
        if made is not data:
            said = self.__dict__.setdefault("_said_positions", set())  # a subclass may ask before all is made
            say_positions(made, self.suite.class_names, said)
        return made

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return a loader of a set in its order, shared out among the processes; evaluations have their own."""
        return self.get_test_dataloader(next(iter(self.named_sets(eval_dataset)[1].values())))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the loader of a set to predict; its items may come without labels."""
        data = self.as_set("prediction", test_dataset)
        loader = evaluation_loader(data, self.args, collator=self.data_collator, device=self.accelerator.device)
        return self.accelerator.prepare(loader)

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        *,
        teacher: bool = False,
    ) -> dict[str, float]:
        """Measure accuracy and calibration of every set in one pass over the images.

        Outside of training the reliability diagrams are written to ``<output_dir>/<prefix>_reliability.png`` and sent
        to TensorBoard, W&B or trackio if among ``report_to`` (needs matplotlib; ``args.reliability_diagrams`` False:
        neither).

        Args:
            eval_dataset: ``None``: all sets of the suite, during training those of ``args.eval_sets``. A name of one of
                them, or a dict of sets: metrics are called ``eval_<set>_<metric>``. One set: ``eval_<metric>``.
            ignore_keys: Not used; only embeddings are computed.
            metric_key_prefix: First part of the metrics' names.
            teacher: Evaluate the teacher instead of the student; metrics are called ``eval_teacher_...``.
        Returns:
            Metrics by name: those of :func:`~carot_hf.calibration_metrics` for each set, ``eval_id_*`` (the test
            set) and ``eval_ood_*`` (unweighted mean over the shifted sets). When the validation set is among them
            also ``eval_temperature``, fitted on it, and ``*_ece_ts`` and ``*_nll_ts`` of the other sets with that
            temperature. (For SigLIP also ``eval_bias``; ``*_ts`` are with both.) With
            ``args.calibration_method`` "perturbed" or "density", or after such a :meth:`calibrate`, also ``*_pts`` and
            ``*_dts``. Accuracies and errors are fractions, ``nll`` is in nats.
        Raises:
            ValueError: If there is no such set, or it has no labels; if there is no teacher.
        """
        if not teacher:
            return self._measure(eval_dataset, metric_key_prefix)
        self._evaluated = self.teacher_network()
        try:
            return self._measure(eval_dataset, f"{metric_key_prefix}_teacher")
        finally:
            self._evaluated = None

    def _measure(self, eval_dataset: Any, prefix: str) -> dict[str, float]:
        named, sets = self.named_sets(eval_dataset)
        self._memory_tracker.start()
        start = time.time()
        evaluator, final = self.evaluator, not self.is_in_train
        found = evaluator.evaluate(sets, own_metrics=self._own_metrics, remember=final)
        self.bins, self.bins_ts = dict(found.bins), dict(found.bins_ts)
        self.bins_pts, self.bins_dts = dict(found.bins_pts), dict(found.bins_dts)
        one = {f"{prefix}_{name}": value for name, value in found.metrics.get("set", {}).items()}
        flat = found.flat(prefix) if named else one
        compared = found.comparison
        if final and eval_dataset is None and self._evaluated is None:
            self.latest, self.latest_rows = replace(compared, model=self.model), found.per_image
        samples = sum(found.sizes.values())
        flat.update(speed_metrics(prefix, start, num_samples=samples, num_steps=evaluator.embedder.steps(samples)))
        self.log(flat)
        # Workaround, transformers 5.23: a dict of sets fires `on_evaluate` once a set and never for their mean, so that
        # early stopping and the best model could not see `eval_ood_ece`. Here one call shows all. Until: Trainer does.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, flat)
        self._memory_tracker.stop_and_update_metrics(flat)
        if final and self.draws():
            tables = diagram_tables(compared.bins, compared.bins_ts, compared.temperature)
            keep_diagrams(diagrams_path(self.args.output_dir, prefix), tables)
            send_diagrams(self.callback_handler.callbacks, tables, prefix=prefix, step=self.state.global_step)
        return flat

    @property
    def evaluator(self) -> Evaluator:
        """The :class:`~carot_hf.Evaluator` of the student, for a while of the teacher."""
        args = self.args
        embedder = Embedder(
            image_transform(self.processing_class),
            self.data_collator,
            args.eval_batch_size,
            args.device,
            skip=args.skips_bad_images,
            loader=loader_options(args, self.accelerator.device),
            autocast=self.accelerator.autocast,
            progress=not args.disable_tqdm and self.is_world_process_zero(),
            after_batch=self._after_batch,
            bad_images=self.bad_images,
        )
        return Evaluator(
            self.accelerator.unwrap_model(self.model if self._evaluated is None else self._evaluated),
            self.processing_class,
            self.suite,
            n_bins=args.n_bins,
            criterion=args.calibration_criterion,
            bounds=args.calibration_bounds,
            method=args.calibration_method,
            train=self.training_set(),
            captions=self.captions,
            embedder=embedder,
            memory=self._memory if self._evaluated is None else None,
        )

    def _after_batch(self, loader: Any) -> None:
        """Let callbacks see that a batch was evaluated: one of them shows a bar."""
        self.callback_handler.eval_dataloader = loader
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    @property
    def _own_metrics(self) -> Callable[[Tensor, Tensor], dict[str, float]] | None:
        """``compute_metrics``, of logits and labels."""
        if self.compute_metrics is None:
            return None
        return lambda logits, labels: denumpify_detensorize(
            self.compute_metrics(EvalPrediction(predictions=logits.cpu().numpy(), label_ids=labels.numpy()))
        )

    def named_sets(self, eval_dataset: Any) -> tuple[bool, dict[str, ShiftSet]]:
        """Return whether the metrics carry the names of the sets, and the sets."""
        known = self.eval_dataset
        if isinstance(eval_dataset, str):
            if not isinstance(known, dict) or eval_dataset not in known:
                names = sorted(known) if isinstance(known, dict) else []
                raise ValueError(f"Expected the name of a set of {names}, got {eval_dataset!r}. Correct the name.")
            eval_dataset = {eval_dataset: known[eval_dataset]}
        data = eval_dataset
        if data is None:
            data = self._watched(known) if self.is_in_train else known
        if data is None:
            raise ValueError("Expected a data set to evaluate, got None. Pass one, or a suite.")
        if isinstance(data, dict):
            return True, {name: self.as_set(name, value) for name, value in data.items()}
        return False, {"set": self.as_set("evaluation", data)}

    def _watched(self, known: Any) -> Any:
        """What an evaluation during training measures: of the suite's sets those of ``eval_sets``, others as passed."""
        sets = self.suite.evaluation_sets
        own = (
            isinstance(known, dict) and known.keys() == sets.keys() and all(known[name] is sets[name] for name in sets)
        )
        if not own or self.args.eval_sets != SPLIT:
            return known
        return {SPLIT: needed(self.suite.validation, "validation", "to measure during training")}

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the logits ``(n, labels)`` of one set and its metrics; ``predict`` is built on it."""
        data = self.as_set("prediction", getattr(dataloader.dataset, "data", dataloader.dataset))
        evaluator = self.evaluator
        logits, labels = evaluator.predict(data, remember=not self.is_in_train, title=description)
        metrics: dict[str, float] = {}
        if labels is not None:
            seen, _ = read_set(logits, labels, {"": ({}, None)}, n_bins=self.args.n_bins, link=evaluator.link)
            own = self._own_metrics
            metrics = {**seen[""].metrics(), **({} if own is None else own(logits, labels))}
        named = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        ids = None if labels is None else labels.numpy()
        return EvalLoopOutput(predictions=logits.numpy(), label_ids=ids, metrics=named, num_samples=len(logits))

    def calibrate(self, method: str | None = None, images: Any = None) -> dict[str, Any]:
        """Fit what calibrates the student on held-out home data and bake its temperature into ``logit_scale``.

        For SigLIP a bias is fitted with it and goes into ``logit_bias``. Accuracy does not change; the saved model
        gives calibrated probabilities in the stock pipelines. After an :meth:`evaluate` of the same weights no image
        and no caption is embedded again.

        Args:
            method: "temperature": the best one for the validation set; where the data shift it is too low.
                "perturbed": one for it and for perturbed copies of its images. "density": that of "temperature", and a
                further one for each image, by how near it is to the images of the training. It is saved beside the
                model; :func:`carot_hf.pipeline`, `export_classifier` and ONNX files apply it. "target": fitted to
                `images` without labels. ``None``: ``args.calibration_method``.
            images: Of the place of use, with "target": a set, or rows with images; labels are not read.
        Returns:
            The record that is kept in ``config.calibration``; see :meth:`carot_hf.Evaluator.calibrate`.
        Raises:
            RuntimeError: If the model is calibrated already.
        """
        check_not_baked(self.model)
        if self.model.dtype == torch.bfloat16:
            logger.info("The model is brought to float32: a temperature baked into bfloat16 may be off by 1.6 %%.")
            self.model.float()
        return self.evaluator.calibrate(method, None if images is None else self.as_set("target", images))

    def estimate(self, images: Any) -> dict[str, float]:
        """Estimate the accuracy on images without labels, with intervals, and how far they are from home.

        Args:
            images: A set, or rows with images; labels are not read.
        Returns:
            See :func:`~carot_hf.evaluation.estimated.estimated`.
        """
        return self.evaluator.estimate(self.as_set("prediction", images))

    def predict_sets(self, images: Any, score: str = "aps") -> Any:
        """Return which classes are in the conformal set of each image; see :meth:`carot_hf.Evaluator.sets`.

        Args:
            images: A set, or rows with images.
            score: "aps" or "lac".
        """
        return self.evaluator.sets(self.as_set("prediction", images), score)

    @property
    def calibrator(self) -> DensityCalibrator | None:
        """Of :meth:`calibrate` by the method "density": divides the logits of each image once more."""
        return self._memory.calibrator if calibrated_per_image(self.model) else None

    def draws(self) -> bool:
        """Whether this process draws reliability diagrams."""
        return self.args.reliability_diagrams and self.is_world_process_zero() and can_draw()
