"""PublishingTrainer: a ``transformers.Trainer`` that publishes a chosen list of files, with our card.

What the card says a subclass says, by the methods under "what a subclass says".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..basics.escape import guarded
from ..basics.manifest import listed_files
from ..basics.whole_file import whole_file
from ..calibration.record import calibration_record
from ..models.lora import base_model
from .card import CardFacts, model_card
from .facts import as_list
from .publish import CARD_NAME, asked_files
from .publisher import Publisher

logger = guarded(logging.get_logger(__name__))


class PublishingTrainer(Trainer, ABC):
    """A ``Trainer`` that publishes a chosen list of files; arguments as there.

    Attributes:
        publisher: Uploads.
        saved_files: What the latest :meth:`save_model` wrote into ``output_dir``; whoever saves says it.
    """

    args: Any
    model: Any
    push_in_progress: Any
    saved_files: list[str]

    def __init__(self, **kwargs: Any) -> None:
        self.publisher = Publisher(kwargs["args"])  # Trainer makes the repository when it is made
        super().__init__(**kwargs)

    # ---- what a subclass says ----

    @abstractmethod
    def card_facts(self, given: Mapping[str, Any]) -> CardFacts:
        """What the card says, and draw its picture.

        Args:
            given: Arguments of :meth:`create_model_card`.
        """

    @abstractmethod
    def teacher_files(self) -> list[str]:
        """Save the teacher into ``output_dir``; return its files, relative to it."""

    # ---- publishing ----

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository on the Hub, before anything is trained; arguments as for ``Trainer.init_hf_repo``.

        Raises:
            ValueError: If the Hub refuses, or cannot be reached.
        """
        with self.publisher.opening(self.args.hub_model_id):
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
        if teacher:
            self.publisher.teacher = self.teacher_files()
        if calibration_record(base_model(self.model)) is None:
            logger.warning("An uncalibrated model is pushed, and its card says so. Call `calibrate` before.")
        first = self.is_world_process_zero()
        further = asked_files(self.args.output_dir, also) if first else []
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            visible = {} if private is None else {"private": private}
            self.init_hf_repo(token=self.args.hub_token if token is None else token, **visible)
        self._finish_current_push()  # it reads the files that this one writes anew
        self.save_model(_internal_call=True)
        if not first:
            return None
        self.publisher.saved = self.saved_files
        tags = [*as_list(kwargs.pop("tags", None)), *(getattr(self.model, "model_tags", None) or [])]
        name = kwargs.pop("model_name", None) or str(self.hub_model_id).split("/")[-1]
        self.create_model_card(model_name=name, tags=list(dict.fromkeys(tags)), **kwargs)
        options: dict[str, Any] = {"blocking": blocking, "token": token, "revision": revision}
        return self.publisher.push(self.hub_model_id, further, message=commit_message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        if self.args.hub_always_push:
            self._finish_current_push()  # it reads the files that this one writes anew
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.publisher.report(self.hub_model_id, self.push_in_progress)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # weights that nobody has calibrated: the card must not be an older one's
        self.create_model_card(model_name=str(self.hub_model_id).split("/")[-1])
        folder = Path(checkpoint_folder)
        self.publisher.copy_checkpoint(folder, self.processing_class)
        epoch = f"epoch {int(self.state.epoch or 0)}"
        at = f"step {self.state.global_step}" if self.args.save_strategy == SaveStrategy.STEPS else epoch
        listed = listed_files(folder)
        self.push_in_progress = self.publisher.push_checkpoint(
            self.hub_model_id, self.push_in_progress, folder, listed, at
        )

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self.publisher.report(self.hub_model_id, getattr(self, "push_in_progress", None))

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
        """Write ``README.md`` into ``output_dir``: the card, from the latest evaluation of the whole suite.

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
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        given = {"language": language, "license": license, "tags": tags, "model_name": model_name}
        card = model_card(self.card_facts({**given, "finetuned_from": finetuned_from, "dataset": dataset}))
        with whole_file(folder / CARD_NAME) as beside:
            card.save(beside)
