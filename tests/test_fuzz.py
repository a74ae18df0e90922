"""Fuzzing: whatever stands in a stranger's file, nothing but our own errors comes out of it (500 examples each)."""

from __future__ import annotations

import io
import json
import math
import os
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import noise_trainer
from layouts import folders
from PIL import Image
from transformers import TrainerState

from carot_hf import load_suite, unbake_temperature
from carot_hf.basics.manifest import damage_of
from carot_hf.calibration.record import calibration_record
from carot_hf.data.images import BadImageError, read_image
from carot_hf.run.checkpoint_files import run_flaw, state_flaw
from carot_hf.run.resume import read_run
from carot_hf.suites.from_yaml import _SET_KEYS, _SUITE_KEYS
from carot_hf.suites.recommended import method_options

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))  # `make test-release`: 5,000
FUZZ = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(-3, 12), st.sampled_from([10**9, 10**400, -1, 0, 2**63]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=12))
KEYS = st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)


def is_ours(error):
    """Whether an error was raised by a line of the package, as one of bad input."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return isinstance(error, ValueError | TypeError) and str(trace.tb_frame.f_globals["__name__"]).startswith(
        "carot_hf"
    )


def error_of(call, *args, **kwargs):
    """What a call raises, ``None`` if it ends well."""
    try:
        call(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  # that is the question
        return error
    return None


def mutated(content, harm):
    """Bytes with some of them replaced, cut out or put in."""
    changed = bytearray(content)
    for kind, place, value in harm:
        at = place % max(1, len(changed))
        if kind == 0 and changed:
            changed[at] = value
        elif kind == 1:
            del changed[at : at + value]
        elif kind == 2:
            changed[at:at] = bytes([value]) * 3
        else:
            changed = changed[:at]
    return bytes(changed)


HARM = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("train", "test"):
        folders(folder / name, [0, 1] * 3, ["cat", "dog"])
    return folder


# ---- the YAML of a suite ----

WHOLE = {"train": {"path": "train"}, "validation": 0.5, "test": {"path": "test", "name": "home"}}
OPTIONS = st.dictionaries(st.sampled_from(sorted(method_options())), VALUES, max_size=3)
ENTRY = st.dictionaries(st.sampled_from([*_SET_KEYS, "name", "columns", "caption_column"]), VALUES, max_size=3)
SUITES = st.fixed_dictionaries(
    {},
    optional={
        **{key: st.one_of(VALUES, ENTRY) for key in _SUITE_KEYS if key not in ("train", "test")},
        "train": st.one_of(VALUES, ENTRY.map(lambda entry: {**WHOLE["train"], **entry})),
        "test": st.one_of(VALUES, ENTRY.map(lambda entry: {**WHOLE["test"], **entry})),
        "shifts": st.dictionaries(st.text(max_size=5), st.one_of(VALUES, ENTRY), max_size=2),
        "recommended": OPTIONS,
    },
)


def assert_a_suite_or_our_error(file):
    error = error_of(load_suite, file)
    assert error is None or is_ours(error), repr(error)[:500]
    assert len(str(error)) < 20_000


@FUZZ
@given(SUITES)
def test_descriptions_of_suites(place, description):
    file = place / "a.yaml"
    try:
        file.write_text(yaml.safe_dump({**WHOLE, **description}, allow_unicode=True), encoding="utf-8")
    except UnicodeEncodeError:  # a lone surrogate is in no file
        return
    assert_a_suite_or_our_error(file)


@FUZZ
@given(HARM)
def test_damaged_descriptions_of_suites(place, harm):
    file = place / "b.yaml"
    text = yaml.safe_dump({**WHOLE, "templates": ["a {}."], "recommended": {"learning_rate": 1e-5}, "version": "1"})
    file.write_bytes(mutated(text.encode(), harm))
    assert_a_suite_or_our_error(file)


@FUZZ
@given(st.one_of(st.binary(max_size=200), st.text("[]{}:,-?&*!|>'\"#%@` \n\tabx019.~<", max_size=80).map(str.encode)))
def test_texts_in_the_place_of_suites(place, content):
    file = place / "c.yaml"
    file.write_bytes(content)
    assert_a_suite_or_our_error(file)


# ---- checkpoints ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One that a run has written."""
    out = tmp_path_factory.mktemp("run")
    noise_trainer(out, max_steps=2, save_steps=2, logging_steps=1).train()
    return out / "checkpoint-2"


@contextmanager
def harmed(file, value, merge=True):
    """A file with another value, other fields or damage in place of what it holds, for a while."""
    whole = file.read_bytes()
    try:
        if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
            file.write_bytes(mutated(whole, value))
        else:
            merged = {**json.loads(whole), **value} if merge and isinstance(value, dict) else value
            file.write_text(json.dumps(merged), encoding="utf-8")
        yield
    finally:
        file.write_bytes(whole)


def assert_a_sentence_or_none(found):
    assert found is None or (isinstance(found, str) and 0 < len(found) < 2_000)


@FUZZ
@given(st.one_of(VALUES, st.fixed_dictionaries({"files": st.one_of(VALUES, st.dictionaries(
    st.one_of(st.text(max_size=20), st.sampled_from(["model.safetensors", "../x", "/etc/passwd", "a\0b", ".", ""])),
    st.one_of(VALUES, st.fixed_dictionaries({"bytes": SCALARS, "blake2b": SCALARS})), max_size=3))})))  # fmt: skip
def test_manifests(checkpoint, value):
    with harmed(checkpoint / "manifest.json", value, merge=False):
        assert damage_of(checkpoint) is not None
        assert_a_sentence_or_none(damage_of(checkpoint))


@FUZZ
@given(HARM)
def test_damaged_manifests(checkpoint, harm):
    with harmed(checkpoint / "manifest.json", harm):
        assert_a_sentence_or_none(damage_of(checkpoint, checksums=False))
    assert damage_of(checkpoint, checksums=False) is None


FIELDS = st.dictionaries(
    st.one_of(st.sampled_from(sorted(vars(TrainerState()))), st.text(max_size=5)), VALUES, min_size=1, max_size=3
)


@FUZZ
@given(st.one_of(VALUES, FIELDS, HARM))
def test_states_of_trainers(checkpoint, value):
    """What passes is read by transformers and by us without a word."""
    file = checkpoint / "trainer_state.json"
    with harmed(file, value):
        flaw = state_flaw(checkpoint)
        assert_a_sentence_or_none(flaw)
        if flaw is None:
            assert TrainerState.load_from_json(str(file)).global_step == 2
            assert read_run(checkpoint).step == 2


@FUZZ
@given(st.one_of(VALUES, st.dictionaries(st.sampled_from(["format", "suite", "method", "options", "epochs", "changes",
                                                          "processes", "order", "best", "x"]), VALUES, min_size=1,
                                         max_size=3), HARM))  # fmt: skip
def test_facts_of_runs(checkpoint, value):
    file = checkpoint / "run.json"
    with harmed(file, value):
        flaw = run_flaw(file)
        assert_a_sentence_or_none(flaw)
        if flaw is None:
            saved = read_run(checkpoint)
            assert saved.changes == saved.changes
            assert saved.epochs is None or saved.epochs.steps > 0


# ---- calibration ----

_FIELDS = ("threshold", "alpha", "score", "n", "n_classes", "check_sums")
_KEPT = st.fixed_dictionaries({}, optional=dict.fromkeys(_FIELDS, VALUES))
SETS = st.one_of(VALUES, st.dictionaries(st.sampled_from(["lac", "aps", "x"]), st.one_of(VALUES, _KEPT), max_size=2))
TARGETS = st.one_of(VALUES, st.fixed_dictionaries({}, optional={"hash": VALUES, "n": VALUES}))
RECORDS = st.one_of(
    VALUES,
    st.dictionaries(
        st.sampled_from(
            ["temperature", "bias", "logit_scale_before", "logit_bias_before", "n", "split", "templates", "conformal"]
        ),
        st.one_of(VALUES, st.floats(0.01, 20)),
        max_size=4,
    ),
    st.fixed_dictionaries({"temperature": st.floats(1e-3, 1e3)}, optional={"n": VALUES, "logit_scale_before": NUMBERS}),
    st.fixed_dictionaries({"temperature": st.just(2.0), "conformal": SETS, "target": TARGETS}),
)


@FUZZ
@given(RECORDS)
def test_records_of_calibration(record):
    """What passes can be taken out again, and leaves a scale that is a number."""
    model = torch.nn.Module()
    model.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
    model.config = SimpleNamespace(calibration=record)
    error = error_of(calibration_record, model)
    assert error is None or is_ours(error), repr(error)[:500]
    assert len(str(error)) < 1_000
    known = None if error is not None else calibration_record(model)
    if known is not None:
        assert math.isfinite(known["temperature"])
        unbake_temperature(model)
        assert bool(torch.isfinite(model.logit_scale))
        assert not hasattr(model.config, "calibration")


# ---- images ----

FORMS = [
    "PNG",
    "JPEG",
    "GIF",
    "WEBP",
    "BMP",
    "TIFF",
    "PPM",
    "ICO",
    "TGA",
    "PCX",
    "SGI",
    "DDS",
    "JPEG2000",
    "ICNS",
]

STARTS = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF", b"BM", b"II*\0", b"%!PS", b"P6\n"]


def encoded(form):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def assert_an_image_or_our_error(content):
    error = error_of(read_image, content, max_pixels=10_000_000)
    assert error is None or (isinstance(error, BadImageError) and str(error)), repr(error)[:500]


@FUZZ
@given(st.sampled_from(FORMS), HARM)
def test_damaged_images(form, harm):
    assert_an_image_or_our_error(mutated(encoded(form), harm))


@FUZZ
@given(st.sampled_from(STARTS), st.binary(max_size=300))
def test_bytes_in_the_place_of_images(start, content):
    assert_an_image_or_our_error(start + content)
