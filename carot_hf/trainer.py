"""CaRotTrainer: a ``transformers.Trainer`` that fine-tunes CLIP so that it stays robust and calibrated."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from .basics.content_hash import sha256_of_facts
from .basics.escape import guarded, printable
from .basics.precision import at_least_float32, not_finite, wide_dtype
from .basics.processes import lost_process, said_by_first
from .basics.tensor_files import tensors_flaw
from .basics.whole_file import failed_to_write, files_below, whole_files
from .data.suite import ShiftSuite
from .data.survey import say_warnings, survey
from .evaluation.evaluation import Comparison
from .evaluation.evaluator import Memory
from .hub.card import TEACHER_FOLDER, versions
from .models.backbones import load_renamed, logit_head, pair_inputs, weights_flaw
from .models.classifier import linear_probe
from .models.lora import (
    ADAPTERS_NAME,
    BESIDE_NAME,
    adapter_facts,
    adapter_tensors,
    base_model,
    beside_tensors,
    is_adapted,
    load_beside,
    merged,
)
from .models.prepare import check_unchanged
from .objective.gradient_cache import CachedGradients, RandomState, cache_gradients, surrogate
from .objective.objective import Objective
from .run.callbacks import LogitScaleCallback, TerminationCallback
from .run.checkpoint import (
    check_checkpoint,
    checkpoint_folders,
    is_complete,
    newest_complete_checkpoint,
    rotate_checkpoints,
    write_manifest,
)
from .run.checkpoint_files import optimizer_flaw, run_flaw, state_flaw
from .run.header import Plan, every, header, model_line, plan_warnings, refuse_finished, shared_class_share
from .run.input_wait import InputWait
from .run.lock import locked
from .run.resume import (
    RUN_NAME,
    Change,
    Epochs,
    SavedRun,
    apply_hyperparameters,
    check_resumed,
    continued,
    differences,
    hyperparameters,
    read_run,
    run_facts,
    write_run,
)
from .suite_trainer import SuiteTrainer
from .teacher.average import Teacher, beta_momentum, ema_momentum, half_life
from .teacher.callback import Schedule, TeacherCallback
from .teacher.file import TEACHER_NAME, load_teacher_file, save_teacher_file, teacher_flaw
from .training_args import PUBLISHED_STEPS, CaRotTrainingArguments

logger = guarded(logging.get_logger(__name__))


class CaRotTrainer(SuiteTrainer):
    """Fine-tune CLIP with contrastive loss, smoothing, distillation and penalties; judge it under shift.

    SigLIP and SigLIP 2 are fine-tuned with the sigmoid loss that they were pre-trained with, and its distillation.

    With LoRA only the adapters are trained and averaged, and checkpoints hold nothing else; :meth:`save_model`,
    :meth:`save_teacher`, :meth:`push_to_hub` and :meth:`export_classifier` give merged models, which need no peft, and
    leave the one in training as it is.

    Args:
        model: A ``CLIPModel``, to which ``args.lora_rank`` may add LoRA, a ``peft.PeftModel`` of one, or a model of
            another family of :data:`~carot_hf.models.backbones.BACKBONES`.
        args: The arguments; presets are in ``CaRotTrainingArguments.from_preset``.
        suite: Training, validation, test and shifted sets, class names and templates.
        processing_class: The model's processor, e.g. a ``CLIPProcessor``.
        **kwargs: ``data_collator``, ``compute_metrics`` as for :class:`SuiteTrainer`; the rest as for ``Trainer``.
    Attributes:
        teacher: The :class:`~carot_hf.Teacher`, ``None`` when no term of the loss needs one.
        bins: Bin tables of the latest :meth:`evaluate` by set; ``bins_ts`` those with the fitted temperature.
    Raises:
        TypeError: If the model is of no family that is known, or has adapters other than LoRA.
        ValueError: If arguments, captions and suite do not fit each other.
    """

    # Our loss is a mean over the micro-batch: Trainer must divide it by the accumulation steps, labels or not.
    # transformers 5.17 does not know this attribute yet; there `model_accepts_loss_kwargs` below says the same.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: CLIPModel | None = None,
        args: CaRotTrainingArguments | None = None,
        *,
        suite: ShiftSuite,
        processing_class: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, suite=suite, processing_class=processing_class, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.label_smoother = None  # label_smoothing_factor acts in our own loss
        self._term_sums: dict[str, Tensor] = {}
        self._term_steps = 0.0
        self._micro_batches: list[Any] = []  # of one step with the gradient cache
        self._micro_index = 0
        self._cached: CachedGradients | None = None
        self._cached_terms: dict[str, Tensor] = {}
        self._random_states: list[RandomState] = []
        self._teacher_of: tuple[Any, frozenset[str]] = (None, frozenset())  # a student, and what is its own alone
        self._resumes = False
        self._written_teacher: list[str] = []  # files of the latest `save_teacher`
        self._suite_of: tuple[Any, ShiftSuite] | None = None  # the suite with a training set that was passed
        self._saved_run: SavedRun | None = None  # that this one goes on from
        self._epochs: Epochs | None = None
        self._termination = TerminationCallback()
        self.add_callback(self._termination)
        self.method: Objective
        self.teacher: Teacher | None = None
        self._teacher_callback: TeacherCallback | None = None
        self._clamp: LogitScaleCallback | None = None
        self._set_up_method()

    def _set_up_method(self) -> None:
        """Make teacher and callbacks, from the arguments of this moment and for the model of this moment."""
        options: CaRotTrainingArguments = self.args
        before = (self._clamp, self._teacher_callback)
        self.method = Objective(options, self._link)
        self._clamp = LogitScaleCallback(options.max_logit_multiplier) if self.method.clamps_scale else None
        self._teacher_callback = None
        self.teacher = self._made_teacher() if options.needs_teacher else None
        if self.teacher is not None:
            update_every = 0 if options.teacher == "frozen" else options.teacher_update_every
            self._teacher_callback = TeacherCallback(self.teacher, _schedule(options), update_every, save_as=None)
        # where the former ones were: the user's own callbacks see the teacher after its update as they did before
        others = [callback for callback in self.callback_handler.callbacks if callback not in before]
        at = others.index(self._termination) + 1 if self._termination in others else len(others)
        made = [callback for callback in (self._clamp, self._teacher_callback) if callback is not None]
        self.callback_handler.callbacks = [*others[:at], *made, *others[at:]]

    def _made_teacher(self) -> Teacher:
        """A teacher of the model; the one that there is if it was made of the same parameters, some of them frozen."""
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        frozen = [parameter for parameter in student.parameters() if not parameter.requires_grad]
        # a tower in half precision is copied: it does not fit into the teacher's forward pass, which is float32
        share = is_adapted(student) or all(wide_dtype(value.dtype) == value.dtype for value in frozen)
        names = frozenset(
            name
            for name, value in student.named_parameters(remove_duplicate=False)
            if share and not value.requires_grad and value.dim() > 0
        )
        if self.teacher is not None and self._teacher_of[0] is student and self._teacher_of[1] == names:
            return self.teacher
        self._teacher_of = (student, names)
        teacher = Teacher(self.model, share_frozen=share)
        if self.args.torch_compile:  # the student is compiled by accelerate, in the same way
            teacher.model.compile(**self.accelerator.state.dynamo_plugin.to_kwargs())
        return teacher

    def _hp_search_setup(self, trial: Any) -> None:
        """Begin, at the one moment of ``Trainer.train`` when the model and the arguments of this training are known."""
        super()._hp_search_setup(trial)
        self.args.recheck()
        check_unchanged(self._prepared, self.model, self.args)
        self._check_optimizer()
        self._make_collator()
        if getattr(self.model.config, "calibration", None) is not None:
            logger.info("Training starts from a calibrated model: its scale stays, the record of the temperature goes.")
            del self.model.config.calibration
        if self.args.linear_probe and not self._resumes:
            self._fit_head()
        self._set_up_method()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as ``Trainer.train`` does.

        Args:
            resume_from_checkpoint: A checkpoint folder, or ``True`` or "latest" for the newest complete one in
                ``output_dir``.
            **kwargs: As for ``Trainer.train``.
        Raises:
            ValueError: If another run holds ``output_dir``, or it cannot be written to; if there is no complete
                checkpoint to resume from, or only one of another run; if ``output_dir``
                holds a finished model (see ``overwrite_output_dir``); if the test set is trained on.
            RuntimeError: If the loss or a weight is not finite; the last checkpoint is intact.
            SystemExit: With status 143, after SIGTERM: the step is finished and saved.
        """
        with self._alone():
            return self._train(resume_from_checkpoint, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, **kwargs: Any) -> Any:
        survey(self._run_suite)  # a test set that is trained on is refused
        resume_from_checkpoint = self._sound_checkpoint(resume_from_checkpoint)
        if not resume_from_checkpoint and not self._owns_output and not self.args.overwrite_output_dir:
            refuse_finished(self.args.output_dir)
        self._owns_output = True
        self._memory = Memory()
        self._latest = Comparison()  # what was measured is of other weights from here on
        self._term_sums, self._term_steps = {}, 0.0
        self._resumes = bool(resume_from_checkpoint)
        self._input_wait = InputWait()
        try:
            with self._termination.listening():
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except BaseException as error:
            self.report_bad_images(gather=False)  # the other processes may be anywhere: to wait for them would hang
            if isinstance(error, RuntimeError) and (cause := lost_process(error)) is not None:
                raise RuntimeError(f"{cause} {self._kept()}") from error
            raise
        finally:
            self._let_workers_go()
        self.report_bad_images()
        self._check_weights()
        self._written()
        if self._termination.stopped:
            logger.warning("Stopped by SIGTERM after step %d, which is saved.", self.state.global_step)
            raise SystemExit(128 + signal.SIGTERM)
        return output

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold ``output_dir``; all processes end if the first one cannot have it."""
        refused: str | None = None
        with ExitStack() as held:
            if self.is_world_process_zero():
                try:
                    held.enter_context(locked(self.args.output_dir))
                except ValueError as error:
                    refused = str(error)
            refused = said_by_first(refused)
            if refused is not None:
                raise ValueError(refused)
            yield

    def _let_workers_go(self) -> None:
        """End the workers of the training loader, which would stay as long as the trainer.

        When the garbage collector finds a trainer with its loader, it closes the queues first: torch then waits 5
        seconds for each worker, which is never told to end.
        """
        loader = self.callback_handler.train_dataloader
        for part in (loader, getattr(loader, "base_dataloader", None)):
            if part is not None and getattr(part, "_iterator", None) is not None:
                part._iterator = None

    def _run_facts(self) -> dict[str, Any]:
        """What this run is, by the arguments and the model of this moment."""
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        parameters = list(student.parameters())
        train = self._training_set(self.train_dataset)
        known = versions()
        return run_facts(
            self.args,
            suite={
                "name": self.suite.name,
                "class_names": self.suite.class_names,
                "templates": self.suite.templates,
                "content_hash": self.suite.content_hash,
                "training_set": None if train is None else sha256_of_facts(train.facts),
            },
            model={
                "class": type(base_model(student)).__name__,
                "link": self._link,
                **adapter_facts(student),
                "parameters": sum(value.numel() for value in parameters),
                "trained parameters": sum(value.numel() for value in parameters if value.requires_grad),
            },
            versions={name: known[name] for name in ("carot_hf", "torch", "transformers", "accelerate")},
        )

    def _sound_checkpoint(self, asked: str | bool | None) -> str | None:
        """Find the checkpoint to go on from, and look through it before anything of it is loaded."""
        self._saved_run, self._changes = None, []
        if not asked:
            return None
        if asked is True or asked == "latest":
            checkpoint = newest_complete_checkpoint(self.args.output_dir, self._flaw)
        else:
            checkpoint = str(asked)
            check_checkpoint(checkpoint, self._flaw)
        self._compare_runs(checkpoint)
        return checkpoint

    def _flaw(self, checkpoint: Path) -> str | None:
        """Say what is wrong with a complete checkpoint, ``None`` if nothing is; of another run only what can be told.

        A checkpoint of another run is refused by `_compare_runs`, with what is another, not passed over.
        """
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        trained = sum(value.requires_grad for value in student.parameters())
        if (flaw := state_flaw(checkpoint) or run_flaw(checkpoint / RUN_NAME)) is not None:
            return flaw
        if differences(read_run(checkpoint), self._run_facts(), self.args.unnamed()):
            return None
        if is_adapted(student):
            parts = {ADAPTERS_NAME: adapter_tensors(student), BESIDE_NAME: beside_tensors(student)}
            flaws = [tensors_flaw(checkpoint / name, own) for name, own in parts.items()]
        else:
            sharded = self.is_deepspeed_enabled or (checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file()
            flaws = [None if sharded else weights_flaw(student, checkpoint)]
        flaw = next((found for found in flaws if found is not None), None)
        if flaw is None and self.teacher is not None:
            flaw = teacher_flaw(self.teacher, checkpoint / TEACHER_NAME)
        return flaw or optimizer_flaw(checkpoint, trained)

    def _compare_runs(self, checkpoint: str) -> None:
        """Refuse a checkpoint of another run before anything is read; say what else has changed."""
        saved = read_run(checkpoint)
        if saved.facts is not None and self.args.take_constants({**saved.facts["options"], **saved.facts["method"]}):
            self._set_up_method()
        changes = check_resumed(
            saved,
            self._run_facts(),
            ignore_data_skip=self.args.ignore_data_skip,
            deepspeed=self.is_deepspeed_enabled,
        )
        self._saved_run, self._changes = saved, saved.changes
        if saved.facts is None and self.is_world_process_zero():
            logger.warning(
                "%s is of version 0.1 and does not say what its run was: suite, method, batch and order are not "
                "compared. Only with those of the first call does the run end where it would have ended.",
                saved.folder,
            )
        self._say_changes(changes)

    def _say_changes(self, changes: Sequence[Change]) -> None:
        """Warn of each, and keep it for the checkpoints and the card."""
        self._changes += changes
        if self.is_world_process_zero():
            for change in changes:
                logger.warning("Resumed after step %d with %s", change.step, change)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Lay epochs and steps as ``Trainer`` does, of a resumed run from where its checkpoint lies."""
        values = super().set_initial_training_values(args, dataloader)
        num_epochs, steps, *counts, max_steps = values
        self._epochs = None
        if num_epochs == sys.maxsize:  # of a loader without a length
            self._begin(max_steps, 0.0)
            return values
        saved = self._saved_run
        epochs = self._epochs = Epochs(steps) if saved is None else continued(saved, steps)
        if epochs.first_step:
            if args.max_steps > 0:
                num_epochs = epochs.last_epoch(max_steps)
            else:
                max_steps = epochs.last_step(args.num_train_epochs)
        if saved is not None and saved.step >= max_steps:
            logger.warning("Nothing is left to train: %s is at step %d of %d.", saved.folder, saved.step, max_steps)
            num_epochs = 0  # Trainer would take one more step
        self._begin(max_steps, max_steps / steps)
        return num_epochs, steps, *counts, max_steps

    def _begin(self, steps: int, epochs: float) -> None:
        """Bring numbers of steps that nobody named to the length of the run, and say what it will do."""
        options: CaRotTrainingArguments = self.args
        if not self._resumes and options.scale_constants(steps):
            self._set_up_method()
        if not self.is_world_process_zero():
            return
        found = survey(self._run_suite)
        counts = found.counts["train"]
        contrastive = options.objective == "contrastive"
        pairs = self.args.contrastive_batch_size or options.per_device_train_batch_size * options.world_size
        hidden = contrastive and options.same_class == "negative" and counts is not None and counts.sum() > 0
        unnamed = {name: int(getattr(options, name)) for name in options.unnamed()}
        plan = Plan(
            model=model_line(self.accelerator.unwrap_model(self.model)),
            method=self.method.describe(),
            table=found.table(),
            steps=steps,
            epochs=epochs,
            first_step=0 if self._saved_run is None else self._saved_run.step,
            warmup=int(options.get_warmup_steps(steps)),
            teacher=options.teacher if self.teacher is not None else None,
            update_every=0 if self._teacher_callback is None else self._teacher_callback.update_every,
            processes=options.world_size,
            batch=options.per_device_train_batch_size,
            accumulation=options.gradient_accumulation_steps,
            pairs=pairs if contrastive else None,
            shared=shared_class_share(counts, pairs) if hidden and counts is not None else None,
            device=str(options.device),
            scaled={name: steps for name, steps in unnamed.items() if steps != PUBLISHED_STEPS},
            writes=self._will_write(),
        )
        tqdm.write(f"{header(plan)}\n")
        if plan.first_step == 0:  # a run that goes on has said it
            for sentence in plan_warnings(plan):
                logger.warning("%s", sentence)
            say_warnings(self._run_suite)

    @property
    def _run_suite(self) -> ShiftSuite:
        """The suite with the set that is trained on: another one may have been passed."""
        train = self._training_set(self.train_dataset)
        if train is None or train is self.suite.train:
            return self.suite
        if self._suite_of is None or self._suite_of[0] is not self.train_dataset:
            self._suite_of = (self.train_dataset, replace(self.suite, train=train))
        return self._suite_of[1]

    def _will_write(self) -> list[str]:
        """What the run writes, and where."""
        options: CaRotTrainingArguments = self.args
        strategy = getattr(options.save_strategy, "value", options.save_strategy)
        when = {
            "no": "no checkpoints",
            "steps": f"checkpoint-<step> {every(options.save_steps)}",
            "epoch": "checkpoint-<step> after each epoch",
            "best": "checkpoint-<step> when it is the best",
        }
        kept = f", the last {options.save_total_limit} are kept" if options.save_total_limit else ""
        reporters = options.report_to if isinstance(options.report_to, list) else [options.report_to]
        logs = ", ".join(name for name in reporters if name and name != "none")
        lines = f"a line of the log {every(options.logging_steps)}" + (f", also to {logs}" if logs else "")
        return [f"{options.output_dir}: {when[str(strategy)]}{kept if strategy != 'no' else ''}", lines]

    def _written(self) -> None:
        """Say which checkpoints there are at the end."""
        if self.is_world_process_zero():
            kept = [folder.name for folder in checkpoint_folders(self.args.output_dir) if is_complete(folder)]
            where = f"{', '.join(kept)} in {self.args.output_dir}" if kept else "no checkpoint; `save_model` saves it"
            tqdm.write(f"{'finished':<11}{self.state.global_step:,} steps; {printable(where)}\n")

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args, **kwargs)
        if self._saved_run is not None and self._epochs is not None and self._epochs.first_step:
            epochs, steps = self._epochs.position(self.state.global_step)
            batches = 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps
        return epochs, batches

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        wanted = hyperparameters(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._saved_run is None:
            return
        # the state that was loaded holds those of its own time, too
        self.state.compute_steps(self.args, self.state.max_steps)
        if not self.is_deepspeed_enabled:
            step = self._saved_run.step
            self._say_changes(apply_hyperparameters(self.optimizer, self.lr_scheduler, wanted, step))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_current_push()  # Trainer may delete a checkpoint now
        return super()._finalize_training(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch; stop before the optimizer step if its loss is not finite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            self._stop(f"Expected a finite loss at step {self.state.global_step + 1}, got {loss.item()}.")
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take the batches of a step from the loader, and note how long it took."""
        with self._input_wait.waiting():
            batches, items = super().get_batch_samples(*args, **kwargs)
        self._micro_batches = list(batches) if self.args.contrastive_batch_size and len(batches) > 1 else []
        self._micro_index, self._cached = 0, None
        return batches, items

    def _check_weights(self) -> None:
        """Stop before weights that are not finite reach a checkpoint or a user."""
        if (name := not_finite(self.model)) is not None:
            self._stop(f"Expected finite weights after step {self.state.global_step}, got nan or inf in `{name}`.")

    def _stop(self, reason: str) -> NoReturn:
        raise RuntimeError(
            f"{reason} {self._kept()} Lower `learning_rate` or look at the data of this step, then resume."
        )

    def _kept(self) -> str:
        kept = [folder for folder in checkpoint_folders(self.args.output_dir) if is_complete(folder)]
        return f"The last checkpoint is {kept[-1]}." if kept else "No checkpoint was kept yet."

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
        if self._micro_batches and model.training:
            loss, outputs = self._cached_loss(model, inputs)
            return (loss, outputs) if return_outputs else loss
        terms, outputs = self.loss_terms(model, inputs)
        if model.training:
            self._remember(terms)
        loss = self.method.weighted(terms)
        return (loss, outputs) if return_outputs else loss

    def loss_terms(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
        """Compute the loss terms by name, unweighted, and the model's output."""
        if self.args.objective == "cross_entropy":
            outputs = model(pixel_values=inputs["pixel_values"])
            return self.method.class_terms(outputs.logits, inputs["labels"]), outputs
        student = self.accelerator.unwrap_model(model)
        pairs = pair_inputs(inputs)
        outputs = model(**pairs)
        labels = inputs.get("labels")
        terms = self._pair_terms(_unit_embeds(outputs), logit_head(student), labels, self._taught(pairs))
        return {**terms, **self._weight_terms(student)}, outputs

    def _pair_terms(
        self,
        embeds: tuple[Tensor, Tensor],
        head: Sequence[Tensor],
        labels: Tensor | None,
        taught: tuple[Tensor, Tensor] | None,
    ) -> dict[str, Tensor]:
        """The terms that are functions of the embeddings of this device's rows, the teacher's, and the labels."""
        teacher_head = () if self.teacher is None else logit_head(self.teacher.model)
        return self.method.pair_terms(embeds, head, labels, taught, teacher_head)

    def _taught(self, pairs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """The teacher's embeddings."""
        if self.teacher is None:
            return None
        network: Any = self.teacher.model
        with torch.no_grad(), self.accelerator.autocast():
            return _unit_embeds(network(**pairs))

    def _weight_terms(self, student: Any) -> dict[str, Tensor]:
        """The terms that are functions of weights alone."""
        return self.method.weight_terms({name: getattr(student, name).weight for name in self.method.modules})

    def _cached_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """A micro-batch's part of the loss of the whole contrastive batch: :mod:`carot_hf.objective.gradient_cache`.

        Its value is that of the whole batch, in each micro-batch: Trainer takes the mean over them.
        """
        student = self.accelerator.unwrap_model(model)
        count = len(self._micro_batches)
        if self._cached is None:
            self._cached, self._cached_terms = self._embed_micro_batches(model, logit_head(student))
        index = self._micro_index
        self._micro_index += 1
        self._random_states[index].restore()
        outputs = model(**pair_inputs(inputs))
        terms = {**self._cached_terms, **self._weight_terms(student)}
        self._remember(terms)
        part = surrogate(self._cached, index, *_unit_embeds(outputs), logit_head(student))
        penalties = {name: terms[name] for name in terms.keys() - self._cached_terms.keys()}
        if penalties:
            part = part + self.method.weighted(penalties) / count
        value = self.method.weighted({name: term.detach() for name, term in terms.items()})
        return value + count * (part - part.detach()), outputs

    def _embed_micro_batches(
        self, model: nn.Module, head: Sequence[Tensor]
    ) -> tuple[CachedGradients, dict[str, Tensor]]:
        """The first pass over all micro-batches of a step: gradients of their embeddings, and the terms."""
        embeds, taught, labels = [], [], []
        self._random_states = []
        for batch in self._micro_batches:
            inputs = self._prepare_inputs(batch)
            self._random_states.append(RandomState(self.args.device))
            with torch.no_grad(), self.accelerator.autocast():
                embeds.append(_unit_embeds(model(**pair_inputs(inputs))))
            taught.append(self._taught(pair_inputs(inputs)))
            labels += [inputs["labels"]] if "labels" in inputs else []
        whole = torch.cat(labels) if labels else None
        teacher = [pair for pair in taught if pair is not None]
        joined = (
            (torch.cat([pair[0] for pair in teacher]), torch.cat([pair[1] for pair in teacher])) if teacher else None
        )
        terms: dict[str, Tensor] = {}

        def loss_of(images: Tensor, texts: Tensor, *head: Tensor) -> Tensor:
            terms.update(self._pair_terms((images, texts), head, whole, joined))
            return self.method.weighted(terms)

        cached = cache_gradients(embeds, head, loss_of)
        return cached, {name: term.detach() for name, term in terms.items()}

    def _fit_head(self) -> None:
        """Fit the linear head on the frozen features of the training images, as evaluation sees them."""
        logger.info("Linear probe: fitting the head on frozen features before the first step.")
        embeds, labels = self.evaluator.embed({"train": self.train_dataset}, "Linear probe")["train"]
        if labels is None:
            raise ValueError("Expected labels in the training set, got none. A linear probe needs them.")
        network = self.accelerator.unwrap_model(self.model)
        head = [part.cpu() for part in self.evaluator.head()]
        fitted = linear_probe(embeds, labels, *head, label_smoothing=self.args.label_smoothing_factor)
        with torch.no_grad():
            network.head.weight.copy_(fitted[0])
            network.head.bias.copy_(fitted[1])

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of matrices and higher tensors; with ``parity`` of all parameters, as published."""
        return [name for name, value in model.named_parameters() if value.dim() >= 2 or self.args.parity]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the parent multiplies token counts, which means nothing for images."""
        return 0

    def _remember(self, terms: Mapping[str, Tensor]) -> None:
        share = 1.0 / getattr(self, "current_gradient_accumulation_steps", 1)
        for name, term in terms.items():
            self._term_sums[name] = share * term.detach() + self._term_sums.get(name, 0.0)
        self._term_steps += share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms, the teacher's momentum and exp(logit_scale) to the logs of the training loss."""
        if "loss" in logs and self._term_steps:
            for name, total in self._term_sums.items():
                logs[name] = self.accelerator.reduce(total / self._term_steps, reduction="mean").item()
            self._term_sums, self._term_steps = {}, 0.0
            if self._teacher_callback is not None and self._teacher_callback.momentum is not None:
                momentum = self._teacher_callback.momentum
                logs["teacher_momentum"] = momentum
                if momentum < 1:
                    logs["teacher_half_life"] = half_life(momentum, self._teacher_callback.update_every)
            logs["input_wait"] = round(self._input_wait.read(), 4)
            if self.args.objective == "contrastive":
                scale, *bias = (at_least_float32(parameter.detach()) for parameter in logit_head(self.model))
                logs["logit_multiplier"] = scale.exp().item()
                if bias:
                    logs["logit_bias"] = bias[0].item()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            self._write_checkpoint(folder, model, trial)
        except Exception as error:
            if not failed_to_write(error):
                raise
            reason = f"Expected to save {folder}, got {type(error).__name__}: {' '.join(str(error).split())}."
            raise OSError(f"{reason} {self._kept()} Make room, then resume.") from error

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        if self.teacher is not None and self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_teacher_file(self.teacher, folder / TEACHER_NAME)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
            self._in_checkpoint = False
        if self.args.world_size > 1:
            dist.barrier()  # each process saves the state of its own generators
        if self.args.should_save:
            write_run(folder, self._run_facts(), self._epochs, self._changes)
            write_manifest(folder)
            if limit is not None:
                self._finish_current_push()  # of a checkpoint that may go now
            # only now an older checkpoint may go: until here the new one did not count
            rotate_checkpoints(folder.parent, limit, written=folder, best=self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_own(resume_from_checkpoint)
        if not load_renamed(self.accelerator.unwrap_model(self.model), resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not load_renamed(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint):
            super()._load_best_model()
        self._load_own(self.state.best_model_checkpoint)

    def _load_own(self, checkpoint: str) -> None:
        """Restore what is ours in a checkpoint: the teacher, and what is trained beside adapters."""
        if is_adapted(self.model):
            load_beside(self.model, checkpoint)
        self._load_teacher(checkpoint)

    def _load_teacher(self, checkpoint: str) -> None:
        if self.teacher is None:
            return
        path = Path(checkpoint) / TEACHER_NAME
        if not path.is_file():
            raise ValueError(
                f"Expected the teacher's weights in {path}, got no such file. Resume from a checkpoint of a run with a "
                "teacher."
            )
        load_teacher_file(self.teacher, path)

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
                self.processing_class.save_pretrained(beside)
                self._written_teacher = files_below(beside)

    def push_to_hub(self, *args: Any, teacher: bool = False, **kwargs: Any) -> Any:
        """Publish the calibrated student; see :meth:`SuiteTrainer.push_to_hub`.

        Args:
            *args: See there.
            teacher: Publish the teacher's weights too, in the folder ``teacher`` of the repository: uncalibrated, for
                going on with the training or for analysis. They stay in ``output_dir``.
            **kwargs: See there.
        Raises:
            RuntimeError: If there is no teacher, or the upload fails.
            ValueError: If the Hub refuses the token or the name.
        """
        if teacher:
            self.save_teacher(Path(self.args.output_dir) / TEACHER_FOLDER)
            self._teacher_files = [f"{TEACHER_FOLDER}/{name}" for name in self._written_teacher]
        return super().push_to_hub(*args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        *,
        teacher: bool = False,
    ) -> dict[str, float]:
        """Measure accuracy and calibration of every set; see :meth:`SuiteTrainer.evaluate`.

        Args:
            eval_dataset: ``None``: all sets of the suite. A name of one of them, a dict of sets, or one set.
            ignore_keys: Not used.
            metric_key_prefix: First part of the metrics' names.
            teacher: Evaluate the teacher instead of the student; metrics are called ``eval_teacher_...``.
        Raises:
            ValueError: If there is no such set, or no teacher.
        """
        if not teacher:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.teacher is None:
            raise ValueError("Expected a teacher to evaluate, got none. Train with `distillation_weight` > 0.")
        with self._evaluating(self.teacher.model):
            return super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_teacher")


def _unit_embeds(outputs: Any) -> tuple[Tensor, Tensor]:
    """Image and text embeddings of length 1, ``(b, D)`` in at least float32 each."""
    with torch.autocast(outputs.image_embeds.device.type, enabled=False):
        image, text = at_least_float32(outputs.image_embeds), at_least_float32(outputs.text_embeds)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def _schedule(options: CaRotTrainingArguments) -> Schedule:
    """Momentum of the teacher as a function of the step and the number of steps."""
    if options.teacher == "beta":
        return partial(beta_momentum, update_every=options.teacher_update_every, beta=options.teacher_beta)
    return partial(
        ema_momentum,
        start=options.teacher_momentum_start,
        end=options.teacher_momentum_end,
        ramp=options.teacher_momentum_ramp,
    )
