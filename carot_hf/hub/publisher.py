"""Publisher: what of a run's folder goes to the Hub, and what is said when it does not get there."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..basics.escape import guarded
from ..basics.whole_file import files_below, whole_files
from .publish import CARD_NAME, METRICS_NAME, copy_model, published_files, upload

logger = guarded(logging.getLogger(__name__))

LOST = (HTTPError, OSError, RuntimeError)  # what huggingface_hub raises


class Publisher:
    """Uploads an explicit list of files.

    Args:
        args: Training arguments: the folder, the token, the branch.
    Attributes:
        saved: Files that the latest saving of the model wrote into the folder.
        teacher: Files of the teacher that were asked for.
        picture: Of the card.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.saved: list[str] = []
        self.teacher: list[str] = []
        self.picture: str | None = None

    def files(self) -> list[str]:
        """Return what is published: what the saving and the card wrote, and metrics.json."""
        pictures = [] if self.picture is None else [self.picture]
        wanted = [*self.saved, *self.teacher, CARD_NAME, *pictures, METRICS_NAME]
        return published_files(self.args.output_dir, wanted)

    @contextmanager
    def opening(self, name: str | None) -> Iterator[None]:
        """Say what to do where the Hub refuses to make or open a repository, or cannot be reached.

        Raises:
            ValueError: Then.
        """
        try:
            yield
        except (HTTPError, OSError) as error:
            refused = getattr(getattr(error, "response", None), "status_code", None) is not None
            cure = (
                "Run `hf auth login` with a token that may write there, or correct `hub_model_id`."
                if refused
                else "Check the connection and HF_ENDPOINT, or run without `push_to_hub` and push later."
            )
            raise ValueError(
                f"Expected to create or open '{name or Path(self.args.output_dir).name}' on the Hub, "
                f"got: {_one_line(error)} {cure}"
            ) from error

    def push(
        self,
        repo: str | None,
        further: Sequence[str],
        *,
        message: str | None,
        blocking: bool,
        token: Any,
        revision: Any,
    ) -> Any:
        """Upload the files and further ones of the folder in one commit.

        Raises:
            RuntimeError: If that fails; all of it is in the folder.
        """
        names, folder = [*self.files(), *further], self.args.output_dir
        try:
            return upload(
                folder,
                names,
                repo_id=repo,
                commit_message=message,
                token=self.args.hub_token if token is None else token,
                run_as_future=not blocking,
                revision=self.args.hub_revision if revision is None else revision,
            )
        except LOST as error:
            includes = " ".join(f"--include {shlex.quote(name)}" for name in names)
            raise RuntimeError(
                f"Expected to push to '{repo}', got: {_one_line(error)} The model and its card are in {folder}; "
                f"call `push_to_hub` again, or `hf upload {repo} {folder} . {includes}`."
            ) from error

    def copy_checkpoint(self, checkpoint: Path, processor: Any) -> None:
        """Put the model of a checkpoint and the processor into the folder."""
        with whole_files(self.args.output_dir) as beside:
            copy_model(checkpoint, beside)
            processor.save_pretrained(beside)
            self.saved = files_below(beside)

    def push_checkpoint(self, repo: str | None, push: Any, checkpoint: Path, listed: Sequence[str], at: str) -> Any:
        """Upload, in the background, the files of the folder and, as ``hub_strategy`` says, those of a checkpoint.

        Args:
            repo: Id on the Hub.
            push: What is under way; ``None``: nothing.
            checkpoint: Its folder.
            listed: Its files.
            at: Where the training is, for the message.
        Returns:
            What is under way now.
        """
        options: dict[str, Any] = {
            "repo_id": repo,
            "token": self.args.hub_token,
            "run_as_future": True,
            "revision": self.args.hub_revision,
        }
        message = f"Training in progress, {at}"
        jobs = [upload(self.args.output_dir, self.files(), commit_message=message, **options)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            options |= {"commit_message": f"{message}, checkpoint", "path_in_repo": place}
            jobs.append(upload(checkpoint, published_files(checkpoint, listed), **options))
        if push is None or push.is_done():
            return PushInProgress(jobs)
        push.jobs.extend(jobs)
        return push

    def report(self, repo: str | None, push: Any) -> None:
        """Say which pushes in the background have failed; Trainer drops their errors."""
        for job in [] if push is None else [job for job in push.jobs if job.done()]:
            if (error := job.exception()) is not None:
                logger.warning(
                    "Expected to push to '%s' in the background, got: %s The training goes on, and the files are in "
                    "%s; the next push brings them.",
                    repo,
                    _one_line(error),
                    self.args.output_dir,
                )
            push.jobs.remove(job)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
