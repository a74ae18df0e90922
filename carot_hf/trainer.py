"""CaRotTrainer: a ``transformers.Trainer`` that fine-tunes CLIP so that it stays robust and calibrated.

It wires the collaborators to Trainer's hooks and decides nothing itself: each method says when, the objects it calls
say what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CLIPModel, EarlyStoppingCallback
from transformers.utils import logging

from .basics.escape import guarded
from .basics.precision import at_least_float32
from .basics.whole_file import files_below, whole_files
from .calibration.names import chosen_by
from .data.batches import collator_of
from .data.captions import CaptionTable
from .data.loaders import training_loader
from .data.own_transform import name_of, training_transform
from .data.shift_set import ShiftSet
from .data.suite import ShiftSuite
from .data.survey import survey
from .data.transforms import check_image_size, float_pixels, image_transform
from .evaluation.diagrams import diagram_tables, diagrams_path, keep_diagrams
from .evaluation.evaluation import Reported
from .evaluation.trainer import EvaluatingTrainer
from .hub.card import TEACHER_FOLDER, CardFacts
from .hub.facts import run_facts_for_card
from .hub.trainer import PublishingTrainer
from .models.backbones import logit_head
from .models.classifier import CLIPClassifier
from .models.linear_probe import fit_head
from .models.lora import base_model, merged
from .models.prepare import Prepared, check_unchanged, classifier_of, prepare_model
from .objective.objective import Objective
from .run.announce import announce
from .run.callbacks import LogitScaleCallback
from .run.checks import check_optimizer, check_options, check_training_set
from .run.lock import refuse_file
from .run.method import CompanionMaker, Companions, teacher_words
from .run.parts import CheckpointParts
from .run.resume import run_facts, used_arguments
from .run.search import search_goal
from .run.step import LossStep
from .run.trainer import RunTrainer
from .teacher.average import Teacher, half_life
from .training_args import CaRotTrainingArguments

logger = guarded(logging.get_logger(__name__))


class CaRotTrainer(RunTrainer, EvaluatingTrainer, PublishingTrainer):
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
        suite: Training, validation, test and shifted sets, class names and templates. For one that is evaluated only
            there is :class:`~carot_hf.Evaluator`.
        processing_class: The model's processor, e.g. a ``CLIPProcessor``.
        transform: Varies the training images in place of ``args.augment``: from a PIL image to ``(3, h, w)`` uint8, or
            float32 that is normalised already, such as torchvision's v2. Its draws from global generators repeat.
        data_collator: Replaces :class:`~carot_hf.data.batches.CaRotCollator`. Training samples carry ``draw``, a number
            that is unique to the sample and the epoch; seed whatever is random with it. One that changes the captions
            of ours leaves out ``caption_number``, by which they are told apart.
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

    # Workaround, transformers 5.17 to 5.23: with labels in a batch Trainer takes a `forward(**kwargs)` such as CLIP's
    # for one that counts them, and no longer divides the loss by the accumulation steps. 5.17 reads
    # `model_accepts_loss_kwargs` below instead. Until: Trainer asks the loss, not the signature of `forward`. So with
    # `label_names` and `can_return_loss`, which it reads off the signature, too.
    loss_is_scaled_for_ga = False
    args: Any
    model: Any
    data_collator: Any

    def __init__(
        self,
        model: CLIPModel | None = None,
        args: CaRotTrainingArguments | None = None,
        *,
        suite: ShiftSuite,
        processing_class: Any,
        transform: Callable[[Any], Tensor] | None = None,
        data_collator: Any = None,
        compute_metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        args = CaRotTrainingArguments() if args is None else args
        check_options(args, suite, processing_class, compute_metrics, kwargs)
        refuse_file(args.output_dir)
        self.args, self._collates = args, data_collator is None  # the parent sets the arguments later
        self.suite, self._processor, self._own_transform = suite, processing_class, transform
        self._transform: Any = image_transform(processing_class)
        self.captions: CaptionTable
        self._prepared: Prepared
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
        self.label_names, self.can_return_loss = ["labels"], True
        self.model_accepts_loss_kwargs = False
        self.label_smoother = None  # label_smoothing_factor acts in our own loss
        self.teacher: Teacher | None = None
        self._written_teacher: list[str] = []  # files of the latest `save_teacher`
        self._maker, self._made_callbacks = CompanionMaker(), list[Any]()
        self._companions = Companions()
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
        self._vary()
        self._prepared = prepare_model(model, self.args, self.suite, self._processor)
        self._link, self.captions = self._prepared.link, self._prepared.captions
        return self._prepared.model

    def _vary(self) -> Any:
        """What makes training images of the data, by the arguments of this moment."""
        return training_transform(self._transform, self.args.augment, self._own_transform, collates=self._collates)

    def _set_up(self) -> None:
        """Make collator, objective, teacher and callbacks."""
        args: CaRotTrainingArguments = self.args
        check_optimizer(self.optimizer, self.model)
        if self._collates:
            self.data_collator = collator_of(self._vary(), self.captions, args.order_seed, self.train_dataset)
        self._set_up_method(args)

    def _set_up_method(self, args: CaRotTrainingArguments) -> None:
        self.method = Objective(args, self._link)
        options = self.accelerator.state.dynamo_plugin.to_kwargs() if args.torch_compile else None
        self._companions = self._maker.make(args, self._prepared, self.model, self._student, options)
        self.teacher = self._companions.teacher
        made = [LogitScaleCallback(args.max_logit_multiplier)] if self.method.clamps_scale else list[Any]()
        made += self._companions.callbacks
        # where the former ones were: the user's own callbacks see the teacher after its update as they did before
        others = [callback for callback in self.callback_handler.callbacks if callback not in self._made_callbacks]
        at = others.index(self.termination) + 1 if self.termination in others else len(others)
        self.callback_handler.callbacks, self._made_callbacks = [*others[:at], *made, *others[at:]], made
        self._step = LossStep(
            self.method,
            None if self.teacher is None else self.teacher.model,
            self.captions,
            self._companions.start,
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
        if getattr(self.model.config, "density", None) is not None:
            self._student.drop_density()
        self.forget()  # what was measured: from here on the weights are others
        self._set_up()
        if self.args.linear_probe and self.resumption.saved is None:
            evaluator = self.evaluator
            features = evaluator.embed({"train": self.train_dataset}, "Linear probe")["train"]
            fit_head(self._student, *features, evaluator.head(), self.args.label_smoothing_factor)

    @property
    def _student(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # ---- data ----

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
            seed=self.args.order_seed,
            min_size=self._vary().train_size,
            device=self.accelerator.device,
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(self.bad_images.note(inputs))
        pixels = float_pixels(inputs["pixel_values"], self._transform, base_model(self._student).dtype)
        return {**inputs, "pixel_values": pixels}

    def _training_set(self, data: Any) -> ShiftSet | None:
        return None if data is None else check_training_set(self.as_set("train", data), self.args)

    @property
    def _run_suite(self) -> ShiftSuite:
        """The suite with the set that is trained on: another one may have been passed."""
        train = self._training_set(self.train_dataset)
        if train is None or train is self.suite.train:
            return self.suite
        if self._suite_of is None or self._suite_of[0] is not self.train_dataset:  # what is found out of it is kept
            self._suite_of = (self.train_dataset, replace(self.suite, train=train))
        return self._suite_of[1]

    def training_set(self) -> ShiftSet | None:
        """Return the set that is trained on, the suite's or another that was passed."""
        return self._run_suite.train

    # ---- training ----

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take the batches of a step from the loader."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        joined = bool(self.args.contrastive_batch_size)
        return self._step.begin(batches, self.state.global_step, joined=joined), items

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
            inputs: ``pixel_values``, ``input_ids``; ``attention_mask``, ``labels``, ``caption_index`` may be there.
                With the gradient cache the texts are those that no earlier micro-batch of the step has.
            return_outputs: Return the model's output as well; with ``caption_index`` each of its texts is there once.
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
            callback = self._companions.moves
            if callback is not None and callback.momentum is not None:
                logs["teacher_momentum"] = callback.momentum
                if callback.momentum < 1:
                    logs["teacher_half_life"] = half_life(callback.momentum, callback.update_every)
            logs["input_wait"] = round(self.input_wait.read(), 4)
            if self.args.objective == "contrastive":
                scale, *bias = (at_least_float32(parameter.detach()) for parameter in logit_head(self.model))
                logs |= {"logit_multiplier": scale.exp().item()} | ({"logit_bias": bias[0].item()} if bias else {})
        super().log(logs, start_time)

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
                without metrics of shifted sets, which would be spoiled as tests; and see `eval_sets`.
            n_trials: As there.
            direction: Default: that of the metric; "minimize" for an objective of your own.
            **kwargs: As there.
        Raises:
            ValueError: If the direction is not the metric's.
        """
        goal, direction = search_goal(self.args, self.suite, compute_objective, direction)
        return super().hyperparameter_search(hp_space, goal, n_trials, direction, **kwargs)

    def export_classifier(self) -> CLIPClassifier:
        """Return the model as a classifier of the suite's classes, with its head and its temperature.

        It gives the probabilities that :meth:`predict` gives, needs no text tower, and works in the stock pipeline
        "image-classification". After a calibration by density it carries the bank, and divides by its temperature.
        """
        made = classifier_of(self.accelerator.unwrap_model(self.model), self.suite, self.captions)
        if self.calibrator is not None:
            made.attach_density(self.calibrator)
        return made

    def write_beside(self, folder: Path) -> None:
        """Write the density calibrator, if there is one, into the folder that the model is saved in."""
        if self.calibrator is not None:  # of other weights by now, it says so by its checksum, and is refused
            self.calibrator.save_pretrained(folder)

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

    # ---- what the run, evaluations and the card ask ----

    def teacher_network(self) -> nn.Module:
        """The network of the teacher."""
        if self.teacher is None:
            raise ValueError("Expected a teacher to evaluate, got none. Train with `distillation_weight` > 0.")
        network: nn.Module = self.teacher.model
        return network

    @property
    def parts(self) -> CheckpointParts:
        """What of the run a checkpoint holds beside what Trainer saves."""
        return CheckpointParts(self._student, self.teacher, self._companions.start, sharded=self.is_deepspeed_enabled)

    def facts(self) -> dict[str, Any]:
        """What this run is."""
        train, own = self._training_set(self.train_dataset), name_of(self._own_transform)
        return run_facts(self.args, self.suite, train, self._student, self._link, own)

    def before_run(self) -> None:
        """Refuse a test set that is trained on."""
        survey(self._run_suite)

    def arguments_set(self) -> None:
        """Make objective and teacher anew."""
        self._set_up_method(self.args)

    def announce(self, steps: int, epochs: float) -> None:
        """Say what the run will do."""
        saved = self.resumption.saved
        announce(
            self.args,
            self._run_suite,
            self._student,
            method=self.method.describe(),
            steps=steps,
            epochs=epochs,
            first_step=0 if saved is None else saved.step,
            update_every=None if self._companions.moves is None else self._companions.moves.update_every,
            transform=name_of(self._own_transform),
        )

    def teacher_files(self) -> list[str]:
        """Save the teacher into ``output_dir``; return its files."""
        self.save_teacher(Path(self.args.output_dir) / TEACHER_FOLDER)
        return [f"{TEACHER_FOLDER}/{name}" for name in self._written_teacher]

    def card_facts(self, given: Mapping[str, Any]) -> CardFacts:
        """What the card says, from the latest :meth:`evaluate` of the whole suite; its picture is drawn anew."""
        self.owns_output = True
        latest = self.latest if self.latest.model is self.model else Reported()
        diagram = diagrams_path(str(self.args.output_dir), "eval") if latest.bins and self.draws() else None
        if diagram is not None:  # the file of that name may be of some other evaluation
            keep_diagrams(diagram, diagram_tables(latest.bins, latest.bins_ts, latest.temperature))
        self.publisher.picture = None if diagram is None else diagram.name
        stops = any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks)
        metric, steps = self.args.metric_for_best_model, self.state.global_step
        chose = steps > 0 and (self.args.load_best_model_at_end or stops) and chosen_by(metric, self.suite.test.name)
        return run_facts_for_card(
            self.args,
            self.suite,
            given=given,
            repo=self.hub_model_id,
            model=self.model,
            loss=self.method.describe(),
            teacher_words=teacher_words(self.args),
            measured=latest,
            steps=steps,
            arguments=used_arguments(self.args.changed(), self.resumption.changes),
            changes=self.resumption.changes,
            diagram=self.publisher.picture,
            teacher=bool(self.publisher.teacher),
            chosen_by=metric if chose else None,
        )
