"""The half of the trainer that reads a suite: loaders, one-pass evaluation of every set, prediction, calibration."""

from __future__ import annotations

import copy
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2
from torch import Tensor, nn
from transformers import CLIPModel, EarlyStoppingCallback, EvalPrediction, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import (
    EvalLoopOutput,
    HubStrategy,
    SaveStrategy,
    denumpify_detensorize,
    speed_metrics,
)
from transformers.utils import PushInProgress, logging

from .basics.escape import guarded
from .basics.precision import wide_dtype
from .basics.processes import keep_group
from .basics.redaction import public, public_text
from .basics.whole_file import files_below, whole_file, whole_files
from .calibration.metrics import METRICS, read_set, scaled_metrics
from .calibration.names import (
    DEFAULT_BEST_METRIC,
    HOME,
    SHIFTED,
    SPLIT,
    check_selection,
    chosen_by,
    greater_is_better,
    set_of,
)
from .calibration.record import calibration_record, check_not_baked
from .data.bad_images import BadImages
from .data.batches import (
    CaRotCollator,
)
from .data.captions import CaptionTable, class_embeddings
from .data.loaders import evaluation_loader, loader_options, training_loader
from .data.suite import ShiftSet, ShiftSuite
from .data.transforms import check_image_size, check_processor, image_transform, normalize_pixels
from .ece.binning import CalibrationBins
from .evaluation.diagrams import can_draw, diagram_tables, diagrams_path, send_diagrams, write_diagrams
from .evaluation.embed import Embedder
from .evaluation.evaluation import Comparison
from .evaluation.evaluator import Evaluator, Memory
from .hub.card import CLASSIFICATION, ZERO_SHOT, CardFacts, command_line, model_card, versions
from .hub.publish import CARD_NAME, METRICS_NAME, asked_files, copy_model, published_files, upload
from .models.backbones import TABLE, backbone_of
from .models.classifier import CLIPClassifier, export_classifier
from .models.lora import base_model, check_folder, is_adapted, merged, save_beside
from .models.prepare import Prepared, prepare_model
from .run.checkpoint import listed_files
from .run.lock import refuse_file
from .run.resume import Change, used_arguments
from .training_args import CaRotTrainingArguments

logger = guarded(logging.get_logger(__name__))

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_LISTED = 20  # indices of bad images that a warning names


class SuiteTrainer(Trainer):
    """A ``Trainer`` whose data are a :class:`~carot_hf.ShiftSuite` and whose model is CLIP or one of its relatives.

    Args:
        model: A ``CLIPModel``, a ``peft.PeftModel`` of one with LoRA, or of another family of
            :data:`~carot_hf.models.backbones.BACKBONES`. With the objective "cross_entropy" a ``CLIPModel`` is
            turned into a :class:`~carot_hf.CLIPClassifier` with the suite's zero-shot head; a classifier stays.
        args: The arguments; presets are in ``CaRotTrainingArguments.from_preset``.
        suite: Training, validation, test and shifted sets, class names and templates.
        processing_class: The model's processor, e.g. a ``CLIPProcessor``.
        data_collator: Replaces :class:`~carot_hf.data.batches.CaRotCollator`. Training samples carry ``draw``, a number
            that is unique to the sample and the epoch; seed whatever is random with it.
        compute_metrics: Called for each set with its logits ``(n, labels)`` and labels; its metrics join ours.
        **kwargs: As for ``Trainer``.
    Attributes:
        bins: Bin tables of the latest :meth:`evaluate` by set; ``bins_ts`` those with the fitted temperature.
    Raises:
        TypeError: If the model is of no family that is known.
        ValueError: If arguments, captions and suite do not fit each other.
    """

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
        _check_options(args, suite, processing_class, compute_metrics, kwargs)
        refuse_file(args.output_dir)
        self.args = args  # the parent sets it later
        self.suite = suite
        self._processor = processing_class
        self._objective = args.objective
        self._link: str
        self._prepared: Prepared
        self.captions: CaptionTable
        self._transform: Any = image_transform(processing_class)
        if model is not None:
            model = self._prepare(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=self._training_set(kwargs.pop("train_dataset", suite.train)),
            eval_dataset=kwargs.pop("eval_dataset", suite.evaluation_sets),
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        _check_launch(args)
        keep_group()
        self._check_optimizer()
        self._collates = data_collator is None
        self._make_collator()
        self.label_names = ["labels"]
        self.can_return_loss = True
        self.bins: dict[str, CalibrationBins] = {}
        self.bins_ts: dict[str, CalibrationBins] = {}
        self._bad_images = BadImages()
        self._said_positions: set[tuple[Any, ...]] = set()
        self._owns_output = False  # what is in `output_dir` is of this trainer
        self._changes: list[Change] = []  # since the run was resumed
        self._saved_files: list[str] = []  # by the latest `save_model` in `output_dir`
        self._teacher_files: list[str] = []  # that were asked to be published
        self._card_picture: str | None = None
        self._in_checkpoint = False  # what is saved goes into a checkpoint
        self._evaluated: nn.Module | None = None  # another model than the student, for a while
        self._latest = Comparison()  # by the latest evaluation of the whole suite
        self._memory = Memory()  # of the student's evaluations

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
        data = next(iter(self._sets(eval_dataset)[1].values()))
        return evaluation_loader(data, self.args, collator=self.data_collator, device=self.accelerator.device)

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
        self._objective, self._link = self.args.objective, self._prepared.link
        self.captions = self._prepared.captions
        return self._prepared.model

    def _make_collator(self) -> None:
        """Make our own collator anew, for the model and the seed of this moment."""
        if not self._collates:
            return
        captions = getattr(self.train_dataset, "captions", None) or []
        texts = [text for given in captions for text in ([given] if isinstance(given, str) else given)]
        if texts and (cut := self.captions.remember(texts)):
            logger.warning("%d of %d captions are longer than the model's context, and are cut.", cut, len(texts))
        self.data_collator = CaRotCollator(self._transform, self.captions, self._data_seed)

    def _check_optimizer(self) -> None:
        """Refuse an optimizer of other parameters than the model's: they may have been replaced since it was made."""
        if self.optimizer is None:
            return
        held = {id(value): value for group in self.optimizer.param_groups for value in group["params"]}
        own = {id(value): value for value in self.model.parameters()}
        trained = {key for key, value in own.items() if value.requires_grad}
        strange = len(held.keys() - own.keys())
        if strange or not held.keys() & trained:
            raise ValueError(
                f"Expected an optimizer of the parameters that are trained, got one with {strange} that are not the "
                f"model's and {len(held.keys() & trained)} of the {len(trained)} that are trained: `lora_rank`, "
                "`objective` or `model_init` have put others in their place. Leave `optimizers` out and set `optim`, "
                "`learning_rate` and `weight_decay`, or override `create_optimizer`."
            )
        if missing := len(trained - held.keys()):
            logger.warning("%d of %d trained parameters are not in the optimizer: they stay.", missing, len(trained))

    def _training_set(self, data: Any) -> ShiftSet | None:
        if data is None:
            return None
        train = self._as_set("train", data)
        if train.label_column is None and (train.caption_column is None or self._objective == "cross_entropy"):
            raise ValueError(
                f"Expected labels in set '{train.name}', got none. Each training caption is made from a class name; "
                "name a `caption_column` if the images have captions of their own."
            )
        if train.test_only:
            raise ValueError(f"Expected a set that may be trained on, got '{train.name}', whose terms forbid it.")
        return train

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the loader of a set to predict; its items may come without labels."""
        data = self._as_set("prediction", test_dataset)
        return evaluation_loader(data, self.args, collator=self.data_collator, device=self.accelerator.device)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(self._bad_images.note(inputs))
        pixels = inputs["pixel_values"]
        if pixels.dtype == torch.uint8:
            dtype = wide_dtype(base_model(self._network).dtype)
            pixels = normalize_pixels(pixels, self._transform.mean, self._transform.std, dtype)
            inputs = {**inputs, "pixel_values": pixels}
        return inputs

    def report_bad_images(self, *, gather: bool = True) -> dict[str, list[int]]:
        """Log by set which images were replaced since the last report; training, evaluation, prediction end with it.

        Args:
            gather: Join those of all processes, which must all call this; ``False``: each process logs its own.
        Returns:
            Indices by set (of a stream the numbers of its rows).
        """
        return self._bad_images.report(gather=gather, first=self.is_world_process_zero())

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
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
        Returns:
            Metrics by name: those of :func:`~carot_hf.calibration_metrics` for each set, ``eval_id_*`` (the test
            set) and ``eval_ood_*`` (unweighted mean over the shifted sets). When the validation set is among them
            also ``eval_temperature``, fitted on it, and ``*_ece_ts`` and ``*_nll_ts`` of the other sets with that
            temperature. (For SigLIP also ``eval_bias``; ``*_ts`` are with both.) Accuracies and errors are
            fractions, ``nll`` is in nats.
        Raises:
            ValueError: If there is no such set, or it has no labels.
        """
        prefix = metric_key_prefix
        named, sets = self._sets(eval_dataset)
        self._memory_tracker.start()
        start = time.time()
        final = not self.is_in_train and self._evaluated is None
        found = self.evaluator.evaluate(sets, own_metrics=self._own_metrics, remember=not self.is_in_train)
        self.bins, self.bins_ts = dict(found.bins), dict(found.bins_ts)
        if named:
            flat = found.flat(prefix)
        else:
            flat = {f"{prefix}_{key}": value for key, value in found.metrics["set"].items()}
        if final and eval_dataset is None:
            self._latest = replace(found.comparison, model=self.model)
        samples = sum(found.sizes.values())
        flat.update(speed_metrics(prefix, start, num_samples=samples, num_steps=self.evaluator.embedder.steps(samples)))
        self.log(flat)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, flat)
        self._memory_tracker.stop_and_update_metrics(flat)
        if not self.is_in_train and self._draws():
            compared = found.comparison
            tables = diagram_tables(compared.bins, compared.bins_ts, compared.temperature)
            self._write_diagrams(diagrams_path(self.args.output_dir, prefix), tables)
            send_diagrams(self.callback_handler.callbacks, tables, prefix=prefix, step=self.state.global_step)
        return flat

    @property
    def evaluator(self) -> Evaluator:
        """The :class:`~carot_hf.evaluation.evaluator.Evaluator` of the student, or for a while of the teacher."""
        network, args = self._network, self.args
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
            network,
            self.processing_class,
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
            The record that is kept in ``config.calibration``: temperature, bias (SigLIP), split, size, criterion,
            bounds and whether the temperature is at one, templates, and ``nll`` and ``ece`` of the split before and
            after.
        Raises:
            RuntimeError: If the model is calibrated already.
        """
        check_not_baked(self.model)
        if self.model.dtype == torch.bfloat16:
            logger.info("The model is brought to float32: a temperature baked into bfloat16 may be off by 1.6 %%.")
            self.model.float()
        return self.evaluator.calibrate()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        own = folder == Path(self.args.output_dir)
        self._owns_output |= own
        adapted = is_adapted(self.model) and self.args.should_save
        if self._in_checkpoint or not self.args.should_save:
            super()._save(output_dir, state_dict)
            if adapted:
                save_beside(self.model, folder)
            _drop_pickle(folder)
            return
        if adapted:
            check_folder(folder)
        with whole_files(folder) as beside:
            student, self.model = self.model, merged(self.model) if adapted else self.model
            try:
                super()._save(str(beside), None if adapted else state_dict)
            finally:
                self.model = student
            _drop_pickle(beside)
            written = files_below(beside)
        _drop_stale_weights(folder, written)
        if own:
            self._saved_files = written

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository on the Hub, before anything is trained; arguments as for ``Trainer.init_hf_repo``.

        Raises:
            ValueError: If the Hub refuses, or cannot be reached.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except (HTTPError, OSError) as error:
            refused = getattr(getattr(error, "response", None), "status_code", None) is not None
            cure = (
                "Run `hf auth login` with a token that may write there, or correct `hub_model_id`."
                if refused
                else "Check the connection and HF_ENDPOINT, or run without `push_to_hub` and push later."
            )
            raise ValueError(
                f"Expected to create or open '{self.args.hub_model_id or Path(self.args.output_dir).name}' on the Hub, "
                f"got: {_one_line(error)} {cure}"
            ) from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        also: Sequence[str] = (),
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
            **kwargs: ``model_name``, ``language``, ``license``, ``tags``, ``finetuned_from`` and ``dataset`` go to
                :meth:`create_model_card`.
        Returns:
            What ``HfApi.upload_folder`` returns; ``None`` on other processes than the first.
        Raises:
            ValueError: If the Hub refuses the token or the name, or there is no such file.
            RuntimeError: If the upload fails, after huggingface_hub's own attempts; all of it is in ``output_dir``.
        """
        if calibration_record(base_model(self.model)) is None:
            logger.warning("An uncalibrated model is pushed, and its card says so. Call `calibrate` before.")
        further = asked_files(self.args.output_dir, also) if self.is_world_process_zero() else []
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(
                token=self.args.hub_token if token is None else token,
                **({} if private is None else {"private": private}),
            )
        self._finish_current_push()  # it reads the files that this one writes anew
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = [*_listed(kwargs.pop("tags", None)), *(getattr(self.model, "model_tags", None) or [])]
        name = kwargs.pop("model_name", None) or str(self.hub_model_id).split("/")[-1]
        self.create_model_card(model_name=name, tags=list(dict.fromkeys(tags)), **kwargs)
        names = [*self._published(), *further]
        try:
            return upload(
                self.args.output_dir,
                names,
                repo_id=self.hub_model_id,
                commit_message=commit_message,
                token=self.args.hub_token if token is None else token,
                run_as_future=not blocking,
                revision=self.args.hub_revision if revision is None else revision,
            )
        except (HTTPError, OSError, RuntimeError) as error:  # what huggingface_hub raises
            includes = " ".join(f"--include {shlex.quote(name)}" for name in names)
            raise RuntimeError(
                f"Expected to push to '{self.hub_model_id}', got: {_one_line(error)} The model and its card are in "
                f"{self.args.output_dir}; call `push_to_hub` again, or `hf upload {self.hub_model_id} "
                f"{self.args.output_dir} . {includes}`."
            ) from error

    def _published(self) -> list[str]:
        """The files of ``output_dir`` that are published: what `save_model` and the card wrote, and metrics.json."""
        pictures = [] if self._card_picture is None else [self._card_picture]
        wanted = [*self._saved_files, *self._teacher_files, CARD_NAME, *pictures, METRICS_NAME]
        return published_files(self.args.output_dir, wanted)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._in_checkpoint or not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return  # Trainer asks before the checkpoint is complete; whoever completes it asks again
        if self.args.hub_always_push:
            self._finish_current_push()  # it reads the files that this one writes anew
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self._report_push()
            self._push_in_background(Path(checkpoint_folder))

    def _push_in_background(self, checkpoint: Path) -> None:
        """Publish the model of a checkpoint, and as ``hub_strategy`` says the checkpoint."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # weights that nobody has calibrated: the card must not be an older one's
        self.create_model_card(model_name=str(self.hub_model_id).split("/")[-1])
        with whole_files(self.args.output_dir) as beside:
            copy_model(checkpoint, beside)
            self.processing_class.save_pretrained(beside)
            self._saved_files = files_below(beside)
        epoch = f"epoch {int(self.state.epoch or 0)}"
        at = f"step {self.state.global_step}" if self.args.save_strategy == SaveStrategy.STEPS else epoch
        options: dict[str, Any] = {
            "repo_id": self.hub_model_id,
            "token": self.args.hub_token,
            "run_as_future": True,
            "revision": self.args.hub_revision,
        }
        message = f"Training in progress, {at}"
        jobs = [upload(self.args.output_dir, self._published(), commit_message=message, **options)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            options |= {"commit_message": f"{message}, checkpoint", "path_in_repo": place}
            jobs.append(upload(checkpoint, published_files(checkpoint, listed_files(checkpoint)), **options))
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress(jobs)
        else:
            self.push_in_progress.jobs.extend(jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._report_push()

    def _report_push(self) -> None:
        """Say which pushes in the background have failed; Trainer drops their errors."""
        push: Any = getattr(self, "push_in_progress", None)
        for job in [] if push is None else [job for job in push.jobs if job.done()]:
            if (error := job.exception()) is not None:
                logger.warning(
                    "Expected to push to '%s' in the background, got: %s The training goes on, and the files are in "
                    "%s; the next push brings them.",
                    self.hub_model_id,
                    _one_line(error),
                    self.args.output_dir,
                )
            push.jobs.remove(job)

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
        config, metric = self.model.config, self.args.metric_for_best_model
        stops = any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks)
        chose = self.state.global_step > 0 and (self.args.load_best_model_at_end or stops)
        start = finetuned_from or getattr(config, "_name_or_path", "")
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        latest = self._latest if self._latest.model is self.model else Comparison()
        diagram = diagrams_path(str(folder), "eval") if latest.bins and self._draws() else None
        if diagram is not None:  # anew: the file of that name may be of some other evaluation
            self._write_diagrams(diagram, diagram_tables(latest.bins, latest.bins_ts, latest.temperature))
        self._card_picture = None if diagram is None else diagram.name
        card = model_card(
            CardFacts(
                name=model_name or folder.name,
                repo=self.hub_model_id,
                task=CLASSIFICATION if self._objective == "cross_entropy" else ZERO_SHOT,
                suite=self.suite.name,
                sets={self.suite.test.name: "home", **dict.fromkeys(self.suite.shifts, "shifted")},
                metrics=latest.metrics,
                temperature=latest.temperature,
                n_bins=self.args.n_bins,
                calibration=calibration_record(base_model(self.model)),
                templates=self.suite.templates,
                class_names=self.suite.class_names,
                steps=self.state.global_step,
                processes=self.args.world_size,
                arguments=public(used_arguments(self.args.changed(), self._changes)),
                versions=versions(),
                seed=self.args.seed,
                objective=self._objective,
                command=command_line(sys.argv),
                base_model=start if start and not Path(start).exists() else None,
                license=license,
                language=language,
                diagram=None if diagram is None else diagram.name,
                teacher=bool(self._teacher_files),
                chosen_by=metric if chose and chosen_by(metric, self.suite.test.name) else None,
                datasets=_listed(dataset) or self.suite.datasets,
                tags=_listed(tags),
                suite_version=self.suite.version,
                suite_hash=self.suite.content_hash,
                changes=[
                    public_text(f"After step {change.step:,} the run was resumed with {change}")
                    for change in self._changes
                ],
            )
        )
        with whole_file(folder / CARD_NAME) as beside:
            card.save(beside)

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
        metric = f"eval_{str(self.args.metric_for_best_model or DEFAULT_BEST_METRIC).removeprefix('eval_')}"
        if compute_objective is None:
            better = "maximize" if greater_is_better(metric) else "minimize"
            if direction not in (None, better):
                raise ValueError(
                    f"Expected `direction` '{better}' for {metric!r}, got {direction!r}. Leave it out, or pass a "
                    "`compute_objective`."
                )
            direction = better
        shifts = (*self.suite.shifts, SHIFTED)
        homes = (SPLIT, HOME, self.suite.test.name)

        def objective(metrics: dict[str, float]) -> float:
            """From the metrics of all sets but the shifted ones."""
            kept = {name: value for name, value in metrics.items() if set_of(name, (*homes, *shifts)) not in shifts}
            if compute_objective is not None:
                return compute_objective(kept)
            if metric not in kept:
                raise ValueError(
                    f"Expected the metric {metric!r} of the evaluation, got {sorted(kept)}. Name one of these as "
                    "`metric_for_best_model`, or pass a `compute_objective`."
                )
            return kept[metric]

        return super().hyperparameter_search(hp_space, objective, n_trials, direction or "minimize", **kwargs)

    def export_classifier(self) -> CLIPClassifier:
        """Return the model as a classifier of the suite's classes, with its head and its temperature.

        It gives the probabilities that :meth:`predict` gives, needs no text tower, and works in the stock pipeline
        "image-classification".
        """
        network = merged(self.accelerator.unwrap_model(self.model))
        if isinstance(network, CLIPClassifier):
            twin: CLIPClassifier = copy.deepcopy(network).eval()
            return twin
        if not backbone_of(network).classifier:
            raise TypeError(
                f"Expected a CLIPModel to export as a classifier, got {type(network).__name__}. Use the model itself; "
                f"see {TABLE}."
            )
        with torch.no_grad():
            classes = class_embeddings(network, self.captions)
        return export_classifier(network, classes, self.suite.class_names)

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

    def _as_set(self, name: str, data: Any) -> ShiftSet:
        """A set of what somebody passed, its labels matched with the suite's classes."""
        made = ShiftSet.of(data, name=name, classes=self.suite.classes)
        if made is not data:
            self._say_positions(made)
        return made

    def _say_positions(self, data: ShiftSet) -> None:
        """Say once how many rows each class is taken to have, where labels are numbers without names."""
        if data.labels is None or data.has_names or data.columns is not None:
            return
        counts = np.bincount(data.labels, minlength=data.num_classes)
        if (data.name, *counts.tolist()) in self._said_positions:
            return
        self._said_positions.add((data.name, *counts.tolist()))
        named = [f"{count:,} {label!r}" for label, count in zip(self.suite.class_names, counts.tolist(), strict=True)]
        logger.warning(
            "Labels of set '%s' are numbers without names, taken for the classes in order: %s%s.",
            data.name,
            ", ".join(named[:_LISTED]),
            ", ..." if len(named) > _LISTED else "",
        )

    def _write_diagrams(self, path: Path, tables: Any) -> None:
        """Write a picture; one that cannot be written is no reason to lose what was computed."""
        try:
            write_diagrams(path, tables)
        except OSError as error:
            logger.warning("The reliability diagrams could not be written to %s: %s.", path, _one_line(error))

    def _draws(self) -> bool:
        """Whether this process draws reliability diagrams."""
        return self.args.reliability_diagrams and self.is_world_process_zero() and can_draw()

    @property
    def _network(self) -> Any:
        """The model that is evaluated: the student, or for a while the teacher."""
        return self.accelerator.unwrap_model(self.model if self._evaluated is None else self._evaluated)

    @contextmanager
    def _evaluating(self, network: nn.Module) -> Iterator[None]:
        """Let everything that evaluates see another model for a while."""
        self._evaluated = network
        try:
            yield
        finally:
            self._evaluated = None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _drop_pickle(folder: Path) -> None:
    """Delete a pickle that nothing reads, in which a `hub_token` would be published."""
    Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)


def _drop_stale_weights(folder: Path, written: Sequence[str]) -> None:
    """Delete weights of an earlier model that was kept in another number of files: they would be loaded."""
    if any(_WEIGHTS.fullmatch(name) for name in written):
        for path in folder.iterdir():
            if _WEIGHTS.fullmatch(path.name) and path.name not in written:
                path.unlink()


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _check_launch(args: CaRotTrainingArguments) -> None:
    """Refuse processes that do not know of each other: each would train alone and write the same files."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() != args.world_size:
        raise ValueError(
            f"Expected {dist.get_world_size()} processes that train together, got {args.world_size} in the training "
            "arguments. On a machine without accelerators add `--use_cpu`."
        )


def _check_options(
    args: CaRotTrainingArguments, suite: ShiftSuite, processing_class: Any, compute_metrics: Any, kwargs: dict[str, Any]
) -> None:
    if not isinstance(args, CaRotTrainingArguments):
        raise TypeError(
            f"Expected CaRotTrainingArguments, got {type(args).__name__}. Make them with "
            "CaRotTrainingArguments.from_preset('carot', output_dir=...)."
        )
    if processing_class is None:
        raise ValueError("Expected the processor of the model, got None. Pass it as `processing_class`.")
    check_processor(processing_class)
    for name in ("compute_loss_func", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"Expected no `{name}`, got one. Override `CaRotTrainer.compute_loss`, or pass `compute_metrics`, "
                "which is called with the logits of each set."
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"Expected one process a device, got one process with {args.n_gpu} GPUs. nn.DataParallel would split the "
            "contrastive batch; start with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES."
        )
    if args.metric_for_best_model is not None:
        _check_best_metric(args, suite, others=compute_metrics is not None or "eval_dataset" in kwargs)


def _check_best_metric(args: CaRotTrainingArguments, suite: ShiftSuite, *, others: bool) -> None:
    """Refuse a metric that cannot choose a model; ``others``: there may be metrics and sets beside the suite's."""
    metric = str(args.metric_for_best_model)
    homes, test = (SPLIT, HOME, suite.test.name), suite.test.name
    check_selection(metric, args.greater_is_better, homes, (SHIFTED, *suite.shifts))
    known = {f"{name}_{key}" for name in homes for key in METRICS}
    known |= {f"{name}_{key}_ts" for name in homes[1:] for key in scaled_metrics()}
    if metric.removeprefix("eval_") not in known and not others:
        raise ValueError(
            f"Expected `metric_for_best_model` as eval_<set>_<metric> with a set of {homes} and a metric of "
            f"{(*METRICS,)}, got {metric!r}. Use for example '{DEFAULT_BEST_METRIC}'; there is no evaluation loss."
        )
    if chosen_by(metric, test):
        logger.warning(
            "`metric_for_best_model` %s chooses the model by the test set '%s', which is reported: its figures will be "
            "too good. Use '%s' to choose by the held-out split.",
            metric,
            test,
            DEFAULT_BEST_METRIC,
        )
