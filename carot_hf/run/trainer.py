"""RunTrainer: a ``transformers.Trainer`` whose runs lose no work, whatever is trained.

One run at a time in a folder, checkpoints that are complete or do not count, a resume from what was looked through, a
stop before weights that are not finite. What is trained a subclass says, by the methods under "what a subclass says".
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from ..basics.escape import guarded
from ..basics.manifest import write_manifest
from ..basics.precision import not_finite
from ..basics.processes import keep_group, lost_process
from ..basics.whole_file import failed_to_write
from ..data.bad_images import BadImages
from ..data.loaders import let_workers_go
from ..models.lora import check_folder, is_adapted, merged, save_beside
from .announce import announce_end, last_kept
from .callbacks import TerminationCallback
from .checkpoint import rotate_checkpoints
from .checks import check_launch
from .early_stopping import arrange
from .header import refuse_finished
from .input_wait import InputWait
from .lock import alone
from .log_for_people import speak_to_people
from .parts import CheckpointParts
from .resume import differences, hyperparameters, read_run, write_run
from .resumption import Resumption
from .saving import drop_pickle, write_model

logger = guarded(logging.get_logger(__name__))


class RunTrainer(Trainer, ABC):
    """A ``Trainer`` whose runs lose no work; arguments as there.

    Attributes:
        resumption: Of the latest :meth:`train`: the run that it goes on from, and what is another since.
        termination: Stops the training on SIGTERM.
        input_wait: How long the training waits for its batches.
        bad_images: Those that were replaced.
        saved_files: What the latest :meth:`save_model` wrote into ``output_dir``.
    """

    args: Any
    model: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        speak_to_people(self.callback_handler, self._set_names)
        check_launch(self.args)
        keep_group()
        self.resumption, self.input_wait, self.bad_images = Resumption(), InputWait(), BadImages()
        self.saved_files: list[str] = []
        self.owns_output = False  # what is in `output_dir` is of this trainer
        self._in_checkpoint = False  # what is saved goes into a checkpoint
        self._losses: Tensor | None = None  # of the micro-batches of a step so far
        self.termination = TerminationCallback()
        self.add_callback(self.termination)
        arrange(self.callback_handler, self.args)

    def _set_names(self) -> list[str]:
        """Names of the sets that are evaluated, for the log."""
        return list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []

    # ---- what a subclass says ----

    @property
    @abstractmethod
    def parts(self) -> CheckpointParts:
        """What of the run a checkpoint holds beside what Trainer saves."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What this run is, in values that JSON keeps; a checkpoint of another one is refused."""

    def before_run(self) -> None:
        """Called when the folder is held, before a checkpoint is looked for; may refuse the run."""

    def arguments_set(self) -> None:
        """Called when numbers of steps that nobody named have been set."""

    def announce(self, steps: int, epochs: float) -> None:
        """Say what the run will do; in the first process."""

    def write_beside(self, folder: Path) -> None:
        """Write what belongs to the model that is saved in a folder; nothing unless a subclass has something."""

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
            self.before_run()
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
            if not checkpoint and not self.owns_output and not self.args.overwrite_output_dir:
                refuse_finished(self.args.output_dir)
            self.owns_output, self.input_wait = True, InputWait()
            output = self._train(checkpoint, **kwargs)
        if self.termination.stopped:
            logger.warning("Stopped by SIGTERM after step %d, which is saved.", self.state.global_step)
            raise SystemExit(128 + signal.SIGTERM)
        return output

    def _train(self, checkpoint: str | None, **kwargs: Any) -> Any:
        self._losses = None  # of a step that an error ended
        try:
            with self.termination.listening():
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        except BaseException as error:
            self.report_bad_images(gather=False)  # the other processes may be anywhere: to wait for them would hang
            if isinstance(error, RuntimeError) and (cause := lost_process(error)) is not None:
                raise RuntimeError(f"{cause} {last_kept(self.args.output_dir)}") from error
            raise
        finally:
            # Workaround, transformers 5.23: after a training that ended in an error Trainer believes to be in it still,
            # and an evaluation would be one of `eval_sets`. Until: it resets this itself.
            self.is_in_train = False
            let_workers_go(self.callback_handler.train_dataloader)
        self.report_bad_images()
        self._check_weights()
        if self.is_world_process_zero():
            announce_end(self.args.output_dir, self.state.global_step)
        return output

    def report_bad_images(self, *, gather: bool = True) -> dict[str, list[int]]:
        """Log by set which images were replaced since the last report; training, evaluation, prediction end with it.

        Args:
            gather: Join those of all processes, which must all call this; ``False``: each process logs its own.
        Returns:
            Indices by set (of a stream the numbers of its rows).
        """
        return self.bad_images.report(gather=gather, first=self.is_world_process_zero())

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take the batches of a step from the loader, and note how long it took."""
        with self.input_wait.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch; stop before the optimizer step if the loss of one of its is not finite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._losses = loss if self._losses is None else self._losses + loss  # a sum shows it: a device is asked once
        if self.accelerator.sync_gradients:
            losses, self._losses = self._losses, None
            if not torch.isfinite(losses):
                self._stop(f"Expected a finite loss at step {self.state.global_step + 1}, got {losses.item()}.")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradient where it is known by clipping or will be logged; elsewhere none is computed."""
        # Workaround, transformers 5.17 to 5.23: Trainer computes it in each step. Until: it asks whether it is logged.
        steps, step = self.args.logging_strategy == "steps", self.state.global_step + 1
        first = self.args.logging_first_step and step == 1
        if grad_norm is None and steps and not first and step % max(1, self.state.logging_steps):
            return None
        return super()._get_grad_norm(model, grad_norm)

    def _check_weights(self) -> None:
        """Stop before weights that are not finite reach a checkpoint or a user."""
        if (name := not_finite(self.model)) is not None:
            self._stop(f"Expected finite weights after step {self.state.global_step}, got nan or inf in `{name}`.")

    def _stop(self, reason: str) -> NoReturn:
        cure = "Lower `learning_rate` or look at the data of this step, then resume."
        raise RuntimeError(f"{reason} {last_kept(self.args.output_dir)} {cure}")

    # ---- going on from a checkpoint ----

    def _checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        """Find the checkpoint to go on from, looked through before anything of it is loaded."""
        self.resumption = Resumption()
        if not asked:
            return None
        found = self.resumption.find(asked, self.args.output_dir, self._flaw)
        options = {"deepspeed": self.is_deepspeed_enabled, "first": self.is_world_process_zero()}
        if self.resumption.compare(found, self.args, self.facts, **options):
            self.arguments_set()
        return found

    def _flaw(self, checkpoint: Path) -> str | None:
        """Say what is wrong with a complete checkpoint, ``None`` if nothing is."""
        return self.parts.flaw(
            checkpoint, lambda: bool(differences(read_run(checkpoint), self.facts(), self.args.unnamed()))
        )

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Lay epochs and steps as ``Trainer`` does, of a resumed run from where its checkpoint lies; say the plan."""
        arrange(self.callback_handler, args)  # a search may have set another patience
        values, steps, epochs = self.resumption.lay(super().set_initial_training_values(args, dataloader), self.args)
        if self.resumption.saved is None and self.args.scale_constants(steps):
            self.arguments_set()
        if self.is_world_process_zero():
            self.announce(steps, epochs)
        return values

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        values = super()._init_training_state(*args, **kwargs)
        return self.resumption.position(self.state.global_step, self.args) or values

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        wanted, first = hyperparameters(self.optimizer), self.is_world_process_zero()
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.resumption.saved is not None:
            # Workaround, transformers 5.23: the steps of logging and saving come with the state that was loaded, and
            # hide those of this run. Until: Trainer computes them after it has loaded the state.
            self.state.compute_steps(self.args, self.state.max_steps)
            if not self.is_deepspeed_enabled:
                self.resumption.keep_hyperparameters(self.optimizer, self.lr_scheduler, wanted, first=first)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.parts.load(resume_from_checkpoint)
        if not self.parts.load_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best: Any = self.state.best_model_checkpoint
        if not self.parts.load_weights(best):
            super()._load_best_model()
        self.parts.load(best)

    # ---- what is saved ----

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        own = folder == Path(self.args.output_dir)
        self.owns_output |= own
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

            def write(beside: Path) -> None:
                save(str(beside), None if adapted else state_dict)
                self.write_beside(beside)

            written = write_model(folder, write)
        finally:
            self.model = student
        if own:
            self.saved_files = written

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
            self.parts.save(folder)
        # Workaround, transformers 5.17 to 5.23: Trainer rotates by the time of the files, and before all processes have
        # written theirs. Until: it goes by the step, after a barrier.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self._in_checkpoint = limit, False
        if self.args.world_size > 1:
            dist.barrier()  # each process saves the state of its own generators
        if self.args.should_save:
            write_run(folder, self.facts(), self.resumption.epochs, self.resumption.changes)
            write_manifest(folder)
            if limit is not None:
                self._finish_current_push()  # of a checkpoint that may go now
            # only now an older checkpoint may go: until here the new one did not count
            rotate_checkpoints(folder.parent, limit, written=folder, best=self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Workaround, transformers 5.17 to 5.23: Trainer pushes before `_save_checkpoint` returns, without what we add.
        # Until: it pushes when the checkpoint is complete, as `_write_checkpoint` does here.
        if not self._in_checkpoint:
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # Workaround, transformers 5.17 to 5.23: Trainer may delete the checkpoint that is being pushed. Until: it
        # waits.
        self._finish_current_push()
        return super()._finalize_training(*args, **kwargs)
