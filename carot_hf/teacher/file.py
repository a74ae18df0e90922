"""The teacher's file in a checkpoint: the average by name, and a mark of the student that it belongs to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..basics.tensor_files import names_by_storage, tensors_flaw
from ..basics.whole_file import whole_file
from .average import Teacher, unwrapped

TEACHER_NAME = "teacher.safetensors"
_MARK = "student"  # its key in the file's metadata
_MARKED_VALUES = 64  # of each parameter


def save_teacher_file(teacher: Teacher, path: str | Path, student: nn.Module | None = None) -> None:
    """Write the teacher's weights and buffers; a reader sees the whole file or none.

    Args:
        teacher: The teacher. Tensors that share storage are written once.
        path: The file; its folder exists.
        student: Note which student the average belongs to, for :func:`load_teacher_file` to compare.
    Raises:
        OSError, SafetensorError: If it cannot be written; nothing is left in its place.
    """
    metadata = {"format": "pt", **({} if student is None else {_MARK: student_mark(student)})}
    with whole_file(path) as beside:
        save_file(_unshared(teacher.state_dict()), str(beside), metadata)


def load_teacher_file(teacher: Teacher, path: str | Path, student: nn.Module | None = None) -> None:
    """Restore what :func:`save_teacher_file` wrote, bit for bit.

    Args:
        teacher: Made from the same kind of model.
        path: The file.
        student: The student that goes on from the same checkpoint; ``None``: do not compare.
    Raises:
        ValueError: If the file was saved with other weights of the student, or its names or shapes differ.
    """
    if student is not None:
        with safe_open(str(path), framework="pt") as file:
            mark = (file.metadata() or {}).get(_MARK)
        if mark is not None and mark != student_mark(student):
            raise ValueError(
                f"Expected {path} to be the average of the student that was loaded, but it was saved with other "
                "weights of the student. If Trainer warned of missing keys, it has not restored the student; else give "
                "the folder that is resumed from as `TeacherCallback(..., resume_from=...)`."
            )
    teacher.load_state_dict(load_file(str(path)))


def teacher_flaw(teacher: Teacher, path: str | Path) -> str | None:
    """Return what is wrong with a teacher's file, before anything is loaded from it; ``None`` if nothing is."""
    return tensors_flaw(path, teacher.state_dict(), teacher.shared)


def student_mark(student: nn.Module) -> str:
    """Return a checksum of up to 64 values of each parameter: equal for equal weights, else different in practice."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in unwrapped(student).named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _MARKED_VALUES)]
        digest.update(name.encode() + str(tuple(parameter.shape)).encode())
        digest.update(sample.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One name for each storage, as safetensors has it; views of a part become tensors of their own."""
    whole = {}
    for name, *_ in names_by_storage(tensors):
        tensor = tensors[name].detach()
        alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        whole[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
    return whole
