"""CaRotTrainer: a ``transformers.Trainer`` that fine-tunes CLIP so that it stays robust and calibrated.

It wires the collaborators to Trainer's hooks and decides nothing itself: each method says when, the objects it calls
say what.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import CLIPModel, EarlyStoppingCallback, EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy, denumpify_detensorize, speed_metrics
from transformers.utils import logging

from .basics.escape import guarded
from .basics.precision import at_least_float32, not_finite, wide_dtype
from .basics.processes import keep_group, lost_process
from .basics.whole_file import failed_to_write, files_below, whole_file, whole_files
from .calibration.metrics import read_set
from .calibration.names import chosen_by
from .calibration.record import calibration_record, check_not_baked
from .data.bad_images import BadImages
from .data.batches import collator_of
from .data.captions import CaptionTable
from .data.loaders import evaluation_loader, let_workers_go, loader_options, training_loader
from .data.suite import ShiftSet, ShiftSuite
from .data.survey import say_positions, survey
from .data.transforms import check_image_size, image_transform, normalize_pixels
from .ece.binning import CalibrationBins
from .evaluation.diagrams import can_draw, diagram_tables, diagrams_path, keep_diagrams, send_diagrams
from .evaluation.embed import Embedder
from .evaluation.evaluation import Comparison
from .evaluation.evaluator import Evaluator, Memory
from .hub.card import TEACHER_FOLDER, model_card
from .hub.facts import as_list, run_facts_for_card
from .hub.publish import CARD_NAME, asked_files
from .hub.publisher import Publisher
from .models.backbones import logit_head
from .models.classifier import CLIPClassifier
from .models.linear_probe import LinearProbeCallback
from .models.lora import base_model, check_folder, is_adapted, merged, save_beside
from .models.prepare import Prepared, check_unchanged, classifier_of, prepare_model
from .objective.objective import Objective
from .run.announce import announce, announce_end, last_kept
from .run.callbacks import LogitScaleCallback, TerminationCallback
from .run.checkpoint import listed_files, rotate_checkpoints, write_manifest
from .run.checks import check_launch, check_optimizer, check_options, check_training_set
from .run.header import refuse_finished
from .run.input_wait import InputWait
from .run.lock import alone, refuse_file
from .run.method import TeacherMaker, teacher_callback
from .run.parts import CheckpointParts
from .run.resume import differences, hyperparameters, read_run, used_arguments, write_run
from .run.resumption import Resumption, facts_of_run
from .run.saving import drop_pickle, write_model
from .run.search import search_goal
from .run.step import LossStep
from .teacher.average import Teacher, half_life
from .teacher.callback import TeacherCallback
from .training_args import CaRotTrainingArguments

logger = guarded(logging.get_logger(__name__))


class CaRotTrainer(Trainer):
    """Fine-tune CLIP with contrastive loss, smoothing, distillation and penalties; judge it under shift.

    SigLIP and SigLIP 2 are fine-tuned with the sigmoid loss that they were pre-trained with, and its distillation.

    With LoRA only the adapters are trained and averaged, and checkpoints hold nothing else; :meth:`save_model`,
    :meth:`save_teacher`, :meth:`push_to_hub` and :meth:`export_classifier` give merged models, which need no peft, and
    leave the one in training as it is.

    Args:
        model: A ``CLIPModel``, to which ``args.lora_rank`` may add LoRA, a ``peft.PeftModel`` of one, or a model of
            another family of :data:`~carot_hf.models.backbones.BACKBONES`. With the objective "cross_entropy" a
            ``CLIPModel`` is turned into a :class:`~carot_hf.CLIPClassifier` with the suite's zero-shot head.
        args: The arguments; presets are in ``CaRotTrainingArguments.from_preset``.
        suite: Training, validation, test and shifted sets, class names and templates.
        processing_class: The model's processor, e.g. a ``CLIPProcessor``.
        data_collator: Replaces :class:`~carot_hf.data.batches.CaRotCollator`. Training samples carry ``draw``, a number
            that is unique to the sample and the epoch; seed whatever is random with it.
        compute_metrics: Called for each set with its logits ``(n, labels)`` and labels; its metrics join ours.
        **kwargs: As for ``Trainer``.
    Attributes:
        teacher: The :class:`~carot_hf.Teacher`, ``None`` when no term of the loss needs one.
        method: The :class:`~carot_hf.objective.objective.Objective`: the terms of the loss that are on.
        bins: Bin tables of the latest :meth:`evaluate` by set; ``bins_ts`` those with the fitted temperature.
    Raises:
        TypeError: If the model is of no family that is known, or has adapters other than LoRA.
        ValueError: If arguments, captions and suite do not fit each other.
    """

    # Our loss is a mean over the micro-batch: Trainer must divide it by the accumulation steps, labels or not.
    # transformers 5.17 does not know this attribute yet; there `model_accepts_loss_kwargs` below says the same.
    loss_is_scaled_for_ga = False
    args: Any
    model: Any
    control: Any
    push_in_progress: Any
    compute_metrics: Any
    data_collator: Any

    def __init__(
        self,
        model: CLIPModel | None = None,
        args: CaRotTrainingArguments | None = None,
        *,
        suite: ShiftSuite,
        processing_class: Any,
        data_collator: Any = None,
        compute_metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        args = CaRotTrainingArguments() if args is None else args
        check_options(args, suite, processing_class, compute_metrics, kwargs)
        refuse_file(args.output_dir)
        self.args = args  # the parent sets it later
        self.suite, self._processor = suite, processing_class
        self._transform: Any = image_transform(processing_class)
        self.captions: CaptionTable
        self._prepared: Prepared
        self._publisher = Publisher(args)
        self._said_positions: set[tuple[Any, ...]] = set()
        self._suite_of: tuple[Any, ShiftSuite] | None = None  # the suite with a training set that was passed
        super().__init__(
            model=None if model is None else self._prepare(model),
            args=args,
            data_collator=data_collator,
            train_dataset=self._training_set(kwargs.pop("train_dataset", suite.train)),
            eval_dataset=kwargs.pop("eval_dataset", suite.evaluation_sets),
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        check_launch(args)
        keep_group()
        self.label_names, self.can_return_loss = ["labels"], True
        self.model_accepts_loss_kwargs = False
        self.label_smoother = None  # label_smoothing_factor acts in our own loss
        self.bins: dict[str, CalibrationBins] = {}
        self.bins_ts: dict[str, CalibrationBins] = {}
        self.teacher: Teacher | None = None
        self._collates = data_collator is None
        self._bad_images, self._input_wait, self._resumption = BadImages(), InputWait(), Resumption()
        self._owns_output = False  # what is in `output_dir` is of this trainer
        self._in_checkpoint = False  # what is saved goes into a checkpoint
        self._evaluated: nn.Module | None = None  # another model than the student, for a while
        self._latest = Comparison()  # by the latest evaluation of the whole suite
        self._memory = Memory()  # of the student's evaluations
        self._written_teacher: list[str] = []  # files of the latest `save_teacher`
        self._teachers, self._made_callbacks = TeacherMaker(), list[Any]()
        self._teacher_callback: TeacherCallback | None = None
        self._termination = TerminationCallback()
        self.add_callback(self._termination)
        self._set_up()

    # ---- what is trained, by the model and the arguments of this moment ----

    def call_model_init(self, trial: Any = None) -> Any:
        """Make a model with ``model_init`` and prepare it as one that is passed in, with the arguments of the trial."""
        if trial is not None:
            super()._hp_search_setup(trial)  # Trainer sets them after the model is made; twice is the same
            self.args.recheck()
        return self._prepare(super().call_model_init(trial))

    def _prepare(self, model: Any) -> Any:
        """Make a model ready; from here on it is the one that is trained and evaluated."""
        check_image_size(model, self._transform)
        self._prepared = prepare_model(model, self.args, self.suite, self._processor)
        self._link, self.captions = self._prepared.link, self._prepared.captions
        return self._prepared.model

    def _set_up(self) -> None:
        """Make collator, objective, teacher and callbacks."""
        args: CaRotTrainingArguments = self.args
        check_optimizer(self.optimizer, self.model)
        if self._collates:
            self.data_collator = collator_of(self._transform, self.captions, self._data_seed, self.train_dataset)
        self._set_up_method(args)

    def _set_up_method(self, args: CaRotTrainingArguments) -> None:
        self.method = Objective(args, self._link)
        self.teacher, self._teacher_callback = None, None
        made: list[Any] = []
        if args.linear_probe:
            made.append(LinearProbeCallback(self._features, args.label_smoothing_factor))
        if self.method.clamps_scale:
            made.append(LogitScaleCallback(args.max_logit_multiplier))
        if args.needs_teacher:
            options = self.accelerator.state.dynamo_plugin.to_kwargs() if args.torch_compile else None
            self.teacher = self._teachers.make(self.model, self._student, options)
            self._teacher_callback = teacher_callback(self.teacher, args)
            made.append(self._teacher_callback)
        else:
            self._teachers = TeacherMaker()
        # where the former ones were: the user's own callbacks see the teacher after its update as they did before
        others = [callback for callback in self.callback_handler.callbacks if callback not in self._made_callbacks]
        at = others.index(self._termination) + 1 if self._termination in others else len(others)
        self.callback_handler.callbacks, self._made_callbacks = [*others[:at], *made, *others[at:]], made
        self._step = LossStep(
            self.method,
            None if self.teacher is None else self.teacher.model,
            unwrap=self.accelerator.unwrap_model,
            autocast=self.accelerator.autocast,
            prepare=self._prepare_inputs,
            device=args.device,
        )

    def _hp_search_setup(self, trial: Any) -> None:
        """Begin, at the one moment of ``Trainer.train`` when the model and the arguments of this training are known."""
        super()._hp_search_setup(trial)
        self.args.recheck()
        check_unchanged(self._prepared, self.model, self.args)
        if getattr(self.model.config, "calibration", None) is not None:
            logger.info("Training starts from a calibrated model: its scale stays, the record of the temperature goes.")
            del self.model.config.calibration
        self._set_up()

    def _features(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What a linear probe is fitted on, and where it starts."""
        evaluator = self.evaluator
        return (*evaluator.embed({"train": self.train_dataset}, "Linear probe")["train"], *evaluator.head())

    @property
    def _student(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # ---- data ----

    @property
    def _data_seed(self) -> int:
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def get_train_dataloader(self) -> Any:
        """Return the training loader; see :func:`~carot_hf.data.loaders.training_loader`."""
        data = self._training_set(self.train_dataset)
        if data is None:
            raise ValueError("Expected a training set, got None. Pass a suite with `train` or a `train_dataset`.")
        return training_loader(
            data,
            self.args,
            batch_size=self._train_batch_size,
            collator=self.data_collator,
            epoch=lambda: int(self.state.epoch or 0),
            seed=self._data_seed,
            min_size=self._transform.train_size,
            device=self.accelerator.device,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return a loader of a set in its order; evaluations have their own."""
        return self.get_test_dataloader(next(iter(self._sets(eval_dataset)[1].values())))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the loader of a set to predict; its items may come without labels."""
        data = self._as_set("prediction", test_dataset)
        return evaluation_loader(data, self.args, collator=self.data_collator, device=self.accelerator.device)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(self._bad_images.note(inputs))
        if inputs["pixel_values"].dtype != torch.uint8:
            return inputs
        dtype = wide_dtype(base_model(self._student).dtype)
        pixels = normalize_pixels(inputs["pixel_values"], self._transform.mean, self._transform.std, dtype)
        return {**inputs, "pixel_values": pixels}

    def report_bad_images(self, *, gather: bool = True) -> dict[str, list[int]]:
        """Log by set which images were replaced since the last report; training, evaluation, prediction end with it.

        Args:
            gather: Join those of all processes, which must all call this; ``False``: each process logs its own.
        Returns:
            Indices by set (of a stream the numbers of its rows).
        """
        return self._bad_images.report(gather=gather, first=self.is_world_process_zero())

    def _as_set(self, name: str, data: Any) -> ShiftSet:
        """A set of what somebody passed, its labels matched with the suite's classes."""
        made = ShiftSet.of(data, name=name, classes=self.suite.classes)
        if made is not data:
            say_positions(made, self.suite.class_names, self._said_positions)
        return made

    def _training_set(self, data: Any) -> ShiftSet | None:
        return None if data is None else check_training_set(self._as_set("train", data), self.args.objective)

    @property
    def _run_suite(self) -> ShiftSuite:
        """The suite with the set that is trained on: another one may have been passed."""
        train = self._training_set(self.train_dataset)
        if train is None or train is self.suite.train:
            return self.suite
        if self._suite_of is None or self._suite_of[0] is not self.train_dataset:  # what is found out of it is kept
            self._suite_of = (self.train_dataset, replace(self.suite, train=train))
        return self._suite_of[1]

    # ---- training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as ``Trainer.train`` does.

        Args:
            resume_from_checkpoint: A checkpoint folder, or ``True`` or "latest" for the newest complete one in
                ``output_dir``.
            **kwargs: As for ``Trainer.train``.
        Raises:
            ValueError: If another run holds ``output_dir``, or it cannot be written to; if there is no complete
                checkpoint to resume from, or only one of another run; if ``output_dir`` holds a finished model (see
                ``overwrite_output_dir``); if the test set is trained on.
            RuntimeError: If the loss or a weight is not finite; the last checkpoint is intact.
            SystemExit: With status 143, after SIGTERM: the step is finished and saved.
        """
        with alone(self.args.output_dir):
            survey(self._run_suite)  # a test set that is trained on is refused
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
            if not checkpoint and not self._owns_output and not self.args.overwrite_output_dir:
                refuse_finished(self.args.output_dir)
            self._owns_output, self._latest, self._memory = True, Comparison(), Memory()
            self._input_wait = InputWait()
            output = self._train(checkpoint, **kwargs)
        if self._termination.stopped:
            logger.warning("Stopped by SIGTERM after step %d, which is saved.", self.state.global_step)
            raise SystemExit(128 + signal.SIGTERM)
        return output

    def _train(self, checkpoint: str | None, **kwargs: Any) -> Any:
        try:
            with self._termination.listening():
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        except BaseException as error:
            self.report_bad_images(gather=False)  # the other processes may be anywhere: to wait for them would hang
            if isinstance(error, RuntimeError) and (cause := lost_process(error)) is not None:
                raise RuntimeError(f"{cause} {last_kept(self.args.output_dir)}") from error
            raise
        finally:
            let_workers_go(self.callback_handler.train_dataloader)
        self.report_bad_images()
        self._check_weights()
        if self.is_world_process_zero():
            announce_end(self.args.output_dir, self.state.global_step)
        return output

    def _checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        """Find the checkpoint to go on from, looked through before anything of it is loaded."""
        self._resumption = Resumption()
        if not asked:
            return None
        found = self._resumption.find(asked, self.args.output_dir, self._flaw)
        options = {"deepspeed": self.is_deepspeed_enabled, "first": self.is_world_process_zero()}
        if self._resumption.compare(found, self.args, self._facts, **options):
            self._set_up_method(self.args)
        return found

    def _flaw(self, checkpoint: Path) -> str | None:
        """Say what is wrong with a complete checkpoint, ``None`` if nothing is."""
        return self._parts.flaw(
            checkpoint, lambda: bool(differences(read_run(checkpoint), self._facts(), self.args.unnamed()))
        )

    def _facts(self) -> dict[str, Any]:
        """What this run is."""
        train = self._training_set(self.train_dataset)
        return facts_of_run(self.args, self.suite, train, self._student, self._link)

    @property
    def _parts(self) -> CheckpointParts:
        return CheckpointParts(self._student, self.teacher, sharded=self.is_deepspeed_enabled)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Lay epochs and steps as ``Trainer`` does, of a resumed run from where its checkpoint lies; say the plan."""
        values, steps, epochs = self._resumption.lay(super().set_initial_training_values(args, dataloader), self.args)
        saved = self._resumption.saved
        if saved is None and self.args.scale_constants(steps):
            self._set_up_method(self.args)
        self._step.forget()
        if self.is_world_process_zero():
            announce(
                self.args,
                self._run_suite,
                self._student,
                method=self.method.describe(),
                steps=steps,
                epochs=epochs,
                first_step=0 if saved is None else saved.step,
                update_every=None if self._teacher_callback is None else self._teacher_callback.update_every,
            )
        return values

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        values = super()._init_training_state(*args, **kwargs)
        return self._resumption.position(self.state.global_step, self.args) or values

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        wanted, first = hyperparameters(self.optimizer), self.is_world_process_zero()
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._resumption.saved is not None:
            # the state that was loaded holds those of its own time, too
            self.state.compute_steps(self.args, self.state.max_steps)
            if not self.is_deepspeed_enabled:
                self._resumption.keep_hyperparameters(self.optimizer, self.lr_scheduler, wanted, first=first)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take the batches of a step from the loader, and note how long it took."""
        with self._input_wait.waiting():
            batches, items = super().get_batch_samples(*args, **kwargs)
        self._step.begin(batches if self.args.contrastive_batch_size else [])
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch; stop before the optimizer step if its loss is not finite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            self._stop(f"Expected a finite loss at step {self.state.global_step + 1}, got {loss.item()}.")
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum the weighted loss terms of :meth:`loss_terms`; each one is logged, unweighted, under its own name.

        Args:
            model: The student, possibly wrapped.
            inputs: ``pixel_values``, ``input_ids``, ``attention_mask``; ``labels`` may be there.
            return_outputs: Return the model's output as well.
            num_items_in_batch: Not used: every term is a mean over the micro-batch.
        """
        share = 1.0 / getattr(self, "current_gradient_accumulation_steps", 1)
        if self._step.caches and model.training:
            loss, outputs = self._step.cached_loss(model, inputs, share)
        else:
            terms, outputs = self.loss_terms(model, inputs)
            if model.training:
                self._step.remember(terms, share)
            loss = self.method.weighted(terms)
        return (loss, outputs) if return_outputs else loss

    def loss_terms(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
        """Compute the loss terms by name, unweighted, and the model's output."""
        return self._step.terms(model, inputs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of matrices and higher tensors; with ``parity`` of all parameters, as published."""
        return [name for name, value in model.named_parameters() if value.dim() >= 2 or self.args.parity]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the parent multiplies token counts, which means nothing for images."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms, the teacher's momentum and exp(logit_scale) to the logs of the training loss."""
        reduce = partial(self.accelerator.reduce, reduction="mean")
        means = self._step.means(reduce) if "loss" in logs else {}
        if means:
            logs.update(means)
            callback = self._teacher_callback
            if callback is not None and callback.momentum is not None:
                logs["teacher_momentum"] = callback.momentum
                if callback.momentum < 1:
                    logs["teacher_half_life"] = half_life(callback.momentum, callback.update_every)
            logs["input_wait"] = round(self._input_wait.read(), 4)
            if self.args.objective == "contrastive":
                scale, *bias = (at_least_float32(parameter.detach()) for parameter in logit_head(self.model))
                logs |= {"logit_multiplier": scale.exp().item()} | ({"logit_bias": bias[0].item()} if bias else {})
        super().log(logs, start_time)

    def _check_weights(self) -> None:
        """Stop before weights that are not finite reach a checkpoint or a user."""
        if (name := not_finite(self.model)) is not None:
            self._stop(f"Expected finite weights after step {self.state.global_step}, got nan or inf in `{name}`.")

    def _stop(self, reason: str) -> NoReturn:
        raise RuntimeError(
            f"{reason} {last_kept(self.args.output_dir)} Lower `learning_rate` or look at the data of this step, then "
            "resume."
        )

    def hyperparameter_search(
        self,
        hp_space: Any = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Search as ``Trainer.hyperparameter_search`` does, for the best `metric_for_best_model`.

        Args:
            hp_space: As there.
            compute_objective: Default: `metric_for_best_model`, or ``eval_validation_nll``. One of your own is called
                without the metrics of shifted sets: chosen by them, a model would spoil them as tests.
            n_trials: As there.
            direction: Default: that of the metric; "minimize" for an objective of your own.
            **kwargs: As there.
        Raises:
            ValueError: If the direction is not the metric's.
        """
        goal, direction = search_goal(self.args, self.suite, compute_objective, direction)
        return super().hyperparameter_search(hp_space, goal, n_trials, direction, **kwargs)

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
            eval_dataset: ``None``: all sets of the suite. A name of one of them, or a dict of sets: metrics are called
                ``eval_<set>_<metric>``. One set: ``eval_<metric>``.
            ignore_keys: Not used; only embeddings are computed.
            metric_key_prefix: First part of the metrics' names.
            teacher: Evaluate the teacher instead of the student; metrics are called ``eval_teacher_...``.
        Returns:
            Metrics by name: those of :func:`~carot_hf.calibration_metrics` for each set, ``eval_id_*`` (the test
            set) and ``eval_ood_*`` (unweighted mean over the shifted sets). When the validation set is among them
            also ``eval_temperature``, fitted on it, and ``*_ece_ts`` and ``*_nll_ts`` of the other sets with that
            temperature. (For SigLIP also ``eval_bias``; ``*_ts`` are with both.) Accuracies and errors are
            fractions, ``nll`` is in nats.
        Raises:
            ValueError: If there is no such set, or it has no labels; if there is no teacher.
        """
        if not teacher:
            return self._evaluate(eval_dataset, metric_key_prefix)
        if self.teacher is None:
            raise ValueError("Expected a teacher to evaluate, got none. Train with `distillation_weight` > 0.")
        self._evaluated = self.teacher.model
        try:
            return self._evaluate(eval_dataset, f"{metric_key_prefix}_teacher")
        finally:
            self._evaluated = None

    def _evaluate(self, eval_dataset: Any, prefix: str) -> dict[str, float]:
        named, sets = self._sets(eval_dataset)
        self._memory_tracker.start()
        start = time.time()
        evaluator, final = self.evaluator, not self.is_in_train
        found = evaluator.evaluate(sets, own_metrics=self._own_metrics, remember=final)
        self.bins, self.bins_ts = dict(found.bins), dict(found.bins_ts)
        one = {f"{prefix}_{name}": value for name, value in found.metrics.get("set", {}).items()}
        flat = found.flat(prefix) if named else one
        compared = found.comparison
        if final and eval_dataset is None and self._evaluated is None:
            self._latest = replace(compared, model=self.model)
        samples = sum(found.sizes.values())
        flat.update(speed_metrics(prefix, start, num_samples=samples, num_steps=evaluator.embedder.steps(samples)))
        self.log(flat)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, flat)
        self._memory_tracker.stop_and_update_metrics(flat)
        if final and self._draws():
            tables = diagram_tables(compared.bins, compared.bins_ts, compared.temperature)
            keep_diagrams(diagrams_path(self.args.output_dir, prefix), tables)
            send_diagrams(self.callback_handler.callbacks, tables, prefix=prefix, step=self.state.global_step)
        return flat

    @property
    def evaluator(self) -> Evaluator:
        """The :class:`~carot_hf.Evaluator` of the student, for a while of the teacher."""
        args = self.args
        embedder = Embedder(
            self._transform,
            self.data_collator,
            args.eval_batch_size,
            args.device,
            skip=str(args.on_bad_image) == "skip",
            loader=loader_options(args, self.accelerator.device),
            autocast=self.accelerator.autocast,
            progress=not args.disable_tqdm and self.is_world_process_zero(),
            after_batch=self._after_batch,
            bad_images=self._bad_images,
        )
        return Evaluator(
            self.accelerator.unwrap_model(self.model if self._evaluated is None else self._evaluated),
            self._processor,
            self.suite,
            n_bins=args.n_bins,
            criterion=args.calibration_criterion,
            bounds=args.calibration_bounds,
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

    def _sets(self, eval_dataset: Any) -> tuple[bool, dict[str, ShiftSet]]:
        """Return whether the metrics carry the names of the sets, and the sets."""
        known = self.eval_dataset
        if isinstance(eval_dataset, str):
            if not isinstance(known, dict) or eval_dataset not in known:
                names = sorted(known) if isinstance(known, dict) else []
                raise ValueError(f"Expected the name of a set of {names}, got {eval_dataset!r}. Correct the name.")
            eval_dataset = {eval_dataset: known[eval_dataset]}
        data = known if eval_dataset is None else eval_dataset
        if data is None:
            raise ValueError("Expected a data set to evaluate, got None. Pass one, or a suite.")
        if isinstance(data, dict):
            return True, {name: self._as_set(name, value) for name, value in data.items()}
        return False, {"set": self._as_set("evaluation", data)}

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the logits ``(n, labels)`` of one set and its metrics; ``predict`` is built on it."""
        data = self._as_set("prediction", getattr(dataloader.dataset, "data", dataloader.dataset))
        logits, labels = self.evaluator.predict(data, remember=not self.is_in_train, title=description)
        metrics: dict[str, float] = {}
        if labels is not None:
            seen, _ = read_set(logits, labels, {"": ({}, None)}, n_bins=self.args.n_bins, link=self._link)
            own = self._own_metrics
            metrics = {**seen[""].metrics(), **({} if own is None else own(logits, labels))}
        named = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        ids = None if labels is None else labels.numpy()
        return EvalLoopOutput(predictions=logits.numpy(), label_ids=ids, metrics=named, num_samples=len(logits))

    def calibrate(self) -> dict[str, Any]:
        """Fit the temperature on the validation set and bake it into the student's ``logit_scale``.

        For SigLIP a bias is fitted with it and goes into ``logit_bias``. Accuracy does not change; the saved model
        gives calibrated probabilities in the stock pipelines. After an :meth:`evaluate` of the same weights no image
        and no caption is embedded again.

        Returns:
            The record that is kept in ``config.calibration``; see :meth:`carot_hf.Evaluator.calibrate`.
        Raises:
            RuntimeError: If the model is calibrated already.
        """
        check_not_baked(self.model)
        if self.model.dtype == torch.bfloat16:
            logger.info("The model is brought to float32: a temperature baked into bfloat16 may be off by 1.6 %%.")
            self.model.float()
        return self.evaluator.calibrate()

    def export_classifier(self) -> CLIPClassifier:
        """Return the model as a classifier of the suite's classes, with its head and its temperature.

        It gives the probabilities that :meth:`predict` gives, needs no text tower, and works in the stock pipeline
        "image-classification".
        """
        return classifier_of(self.accelerator.unwrap_model(self.model), self.suite, self.captions)

    def _draws(self) -> bool:
        """Whether this process draws reliability diagrams."""
        return self.args.reliability_diagrams and self.is_world_process_zero() and can_draw()

    # ---- what is saved ----

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        own = folder == Path(self.args.output_dir)
        self._owns_output |= own
        adapted = is_adapted(self.model) and self.args.should_save
        if self._in_checkpoint or not self.args.should_save:
            super()._save(output_dir, state_dict)
            if adapted:
                save_beside(self.model, folder)
            drop_pickle(folder)
            return
        if adapted:
            check_folder(folder)
        student, self.model = self.model, merged(self.model) if adapted else self.model
        try:
            save = super()._save
            written = write_model(folder, lambda beside: save(str(beside), None if adapted else state_dict))
        finally:
            self.model = student
        if own:
            self._publisher.saved = written

    def save_teacher(self, output_dir: str | Path) -> None:
        """Save the teacher as a model of its own, with the processor; load it with ``CLIPModel.from_pretrained``.

        Raises:
            RuntimeError: If there is no teacher.
        """
        if self.teacher is None:
            raise RuntimeError("Expected a teacher to save, got none. Train with `distillation_weight` > 0.")
        if self.args.should_save:
            network: Any = merged(self.teacher.model)
            with whole_files(output_dir) as beside:
                network.save_pretrained(beside)
                self._processor.save_pretrained(beside)
                self._written_teacher = files_below(beside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            self._write_checkpoint(folder, model, trial)
        except Exception as error:
            if not failed_to_write(error):
                raise
            reason = f"Expected to save {folder}, got {type(error).__name__}: {' '.join(str(error).split())}."
            raise OSError(f"{reason} {last_kept(self.args.output_dir)} Make room, then resume.") from error

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            self._parts.save(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self._in_checkpoint = limit, False
        if self.args.world_size > 1:
            dist.barrier()  # each process saves the state of its own generators
        if self.args.should_save:
            write_run(folder, self._facts(), self._resumption.epochs, self._resumption.changes)
            write_manifest(folder)
            if limit is not None:
                self._finish_current_push()  # of a checkpoint that may go now
            # only now an older checkpoint may go: until here the new one did not count
            rotate_checkpoints(folder.parent, limit, written=folder, best=self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._parts.load(resume_from_checkpoint)
        if not self._parts.load_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._parts.load_weights(self.state.best_model_checkpoint):
            super()._load_best_model()
        self._parts.load(self.state.best_model_checkpoint)

    # ---- what is published ----

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository on the Hub, before anything is trained; arguments as for ``Trainer.init_hf_repo``.

        Raises:
            ValueError: If the Hub refuses, or cannot be reached.
        """
        with self._publisher.opening(self.args.hub_model_id):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        also: Sequence[str] = (),
        teacher: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Publish weights (safetensors), config, processor, card with its picture and metrics.json, and nothing else.

        Call it after :meth:`evaluate` and :meth:`calibrate`, in any order: the card holds the results of the latest
        evaluation of the whole suite since the last training, and the weights hold the temperature. What is missing
        the card says, and a warning. What else lies in ``output_dir`` (logs, checkpoints, files of yours, links) stays.

        Args:
            commit_message: Of the commit.
            blocking: Return when all is there; ``False``: return a future, which holds a failure.
            token: In place of ``hub_token``.
            revision: Branch; default: ``hub_revision``.
            private: Whether a repository that is made now is private; default: ``hub_private_repo``.
            also: Further files or folders of ``output_dir`` to publish, relative to it, e.g. ``"runs"``, the event
                files of TensorBoard.
            teacher: Publish the teacher's weights too, in the folder ``teacher`` of the repository: uncalibrated, for
                going on with the training or for analysis. They stay in ``output_dir``.
            **kwargs: ``model_name``, ``language``, ``license``, ``tags``, ``finetuned_from`` and ``dataset`` go to
                :meth:`create_model_card`.
        Returns:
            What ``HfApi.upload_folder`` returns; ``None`` on other processes than the first.
        Raises:
            ValueError: If the Hub refuses the token or the name, or there is no such file.
            RuntimeError: If there is no teacher, or the upload fails, after huggingface_hub's own attempts; all of it
                is in ``output_dir``.
        """
        first, folder = self.is_world_process_zero(), self.args.output_dir
        if teacher:
            self.save_teacher(Path(folder) / TEACHER_FOLDER)
            self._publisher.teacher = [f"{TEACHER_FOLDER}/{name}" for name in self._written_teacher]
        if calibration_record(base_model(self.model)) is None:
            logger.warning("An uncalibrated model is pushed, and its card says so. Call `calibrate` before.")
        further = asked_files(folder, also) if first else []
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            visible = {} if private is None else {"private": private}
            self.init_hf_repo(token=self.args.hub_token if token is None else token, **visible)
        self._finish_current_push()  # it reads the files that this one writes anew
        self.save_model(_internal_call=True)
        if not first:
            return None
        tags = [*as_list(kwargs.pop("tags", None)), *(getattr(self.model, "model_tags", None) or [])]
        name = kwargs.pop("model_name", None) or str(self.hub_model_id).split("/")[-1]
        self.create_model_card(model_name=name, tags=list(dict.fromkeys(tags)), **kwargs)
        options: dict[str, Any] = {"blocking": blocking, "token": token, "revision": revision}
        return self._publisher.push(self.hub_model_id, further, message=commit_message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._in_checkpoint or not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return  # Trainer asks before the checkpoint is complete; whoever completes it asks again
        if self.args.hub_always_push:
            self._finish_current_push()  # it reads the files that this one writes anew
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self._publisher.report(self.hub_model_id, self.push_in_progress)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # weights that nobody has calibrated: the card must not be an older one's
        self.create_model_card(model_name=str(self.hub_model_id).split("/")[-1])
        folder = Path(checkpoint_folder)
        self._publisher.copy_checkpoint(folder, self._processor)
        epoch = f"epoch {int(self.state.epoch or 0)}"
        at = f"step {self.state.global_step}" if self.args.save_strategy == SaveStrategy.STEPS else epoch
        self.push_in_progress = self._publisher.push_checkpoint(
            self.hub_model_id, self.push_in_progress, folder, listed_files(folder), at
        )

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._publisher.report(self.hub_model_id, getattr(self, "push_in_progress", None))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_current_push()  # Trainer may delete a checkpoint now
        return super()._finalize_training(*args, **kwargs)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write ``README.md`` into ``output_dir``: the card, from the latest :meth:`evaluate` of the whole suite.

        `push_to_hub` calls it. Not used, since they follow from the suite: ``tasks``, ``dataset_tags``,
        ``dataset_args``.

        Args:
            language: Of the captions, as the Hub abbreviates it.
            license: Of the weights.
            tags: Beside those of carot_hf.
            model_name: Default: the name of ``output_dir``.
            finetuned_from: Id of the base model; default: where the model was loaded from, unless it is a folder.
            dataset: Ids of data sets on the Hub; default: those of the suite.
        """
        self._owns_output = True
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        latest = self._latest if self._latest.model is self.model else Comparison()
        diagram = diagrams_path(str(folder), "eval") if latest.bins and self._draws() else None
        if diagram is not None:  # anew: the file of that name may be of some other evaluation
            keep_diagrams(diagram, diagram_tables(latest.bins, latest.bins_ts, latest.temperature))
        self._publisher.picture = None if diagram is None else diagram.name
        stops = any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks)
        metric, test = self.args.metric_for_best_model, self.suite.test.name
        chose = self.state.global_step > 0 and (self.args.load_best_model_at_end or stops) and chosen_by(metric, test)
        changes = self._resumption.changes
        facts = run_facts_for_card(
            self.args,
            self.suite,
            given={
                "language": language,
                "license": license,
                "tags": tags,
                "model_name": model_name,
                "finetuned_from": finetuned_from,
                "dataset": dataset,
            },
            repo=self.hub_model_id,
            start=getattr(self.model.config, "_name_or_path", ""),
            calibration=calibration_record(base_model(self.model)),
            measured=latest,
            steps=self.state.global_step,
            arguments=used_arguments(self.args.changed(), changes),
            changes=changes,
            diagram=self._publisher.picture,
            teacher=bool(self._publisher.teacher),
            chosen_by=metric if chose else None,
        )
        with whole_file(folder / CARD_NAME) as beside:
            model_card(facts).save(beside)
