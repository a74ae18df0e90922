"""Pushing end to end to a Hub on the loopback address: byte-identical files, retries, refusals, use without us."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hub_server import GOOD_TOKEN, Hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from pushes import PUSH, USE, push, run, start
from safetensors.numpy import load as load_tensors
from tolerances import float32_bound
from toys import CLIP, ROOT, SUPPORT

from carot_hf import load_suite
from carot_hf.basics.manifest import damage_of

AGAIN = """
import sys, urllib.request
sys.path.insert(0, {tests!r})
import huggingface_hub.utils._http as http
from launching import noise_trainer

http.time.sleep = lambda seconds: None  # between attempts
options = dict(max_steps=2, save_strategy="steps", save_steps=1, teacher_update_every=1, hub_token={token!r})
trainer = noise_trainer({out!r}, **options, hub_private_repo=True)
trainer.train()
try:
    trainer.push_to_hub()
except RuntimeError as error:
    print("failed:", error)
urllib.request.urlopen(urllib.request.Request({endpoint!r} + "/recover", data=b"", method="POST"))
trainer.push_to_hub(license="mit")
trainer.evaluate()
trainer.calibrate()
trainer.push_to_hub(teacher=True)
hub = dict(push_to_hub=True, hub_strategy="every_save", hub_model_id="tester/early")
early = noise_trainer({out!r} + "/../early", **options, **hub)
early.train()
"""


GO_ON = """
import os, sys
sys.path.insert(0, {tests!r})
from launching import noise_trainer

trainer = noise_trainer(
    {out!r}, max_steps=3, per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")), warmup_steps=0,
    save_strategy="steps", save_steps=1, save_total_limit=1, teacher_update_every=1, push_to_hub={push!r},
    hub_model_id="tester/tiny", hub_strategy="checkpoint", hub_always_push=True,
)
trainer.train(resume_from_checkpoint={resume!r})
trainer.accelerator.end_training()
os._exit(0)  # a thread of gloo that asks for the interpreter's lock while it ends aborts the process
"""


def test_a_push_arrives_whole_and_works_without_us(tmp_path):
    """Two uploads of large files are refused at first; huggingface_hub tries again and nothing is missing."""
    with Hub(failures=2) as hub:
        result = push(tmp_path, hub)
        assert result.returncode == 0, result.stderr[-3000:]
        assert hub.failed == 2
        assert len(hub.commits) == 1, hub.commits  # nothing is published while it trains
        assert len(hub.validated[0]["model-index"][0]["results"]) == 2, hub.validated  # one for each test set
        files = hub.repos["tester/tiny"]
        out = tmp_path / "out"
        own = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        left = {name for name in own if name.startswith("checkpoint-")} | {"learning_curves.png"}
        assert files.keys() - {".gitattributes"} == own - left
        assert left <= own
        for name, content in files.items():
            assert content == (out / name).read_bytes(), name
        assert {"README.md", "model.safetensors", "config.json", "eval_reliability.png"} <= files.keys()
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl")) or "teacher" in name]
        assert GOOD_TOKEN.encode() not in b"".join(files.values())
        temperature = json.loads(files["config.json"])["calibration"]["temperature"]
        scale = load_tensors(files["model.safetensors"])["logit_scale"]
        assert f"T = {temperature:.4f}" in files["README.md"].decode()
        remote = run(tmp_path, USE.format(model="tester/tiny"), hub)
    assert remote.returncode == 0, remote.stderr[-3000:]
    scaled = np.array(json.loads((tmp_path / "logits.json").read_text())) / temperature
    expected = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    scores = json.loads(remote.stdout)
    assert [scores[name] for name in ("zero", "one", "two", "three")] == pytest.approx(
        expected.tolist(), abs=float32_bound(14.3, 12)
    )
    assert abs(temperature - 1) > 0.1
    assert scale.dtype == "float32"


SERVE = """
import json, sys
import numpy as np, torch
from PIL import Image
import carot_hf

image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8))
labels = ["zero", "one", "two", "three"]
classify = carot_hf.pipeline("tester/tiny")
scores = classify(image, candidate_labels=labels, hypothesis_template="the number {}")
inputs = classify.image_processor(images=[image], return_tensors="pt")
with torch.no_grad():
    by = float(classify.calibrator.temperature(classify.model.get_image_features(**inputs).pooler_output))
print(json.dumps([type(classify).__name__, by, {row["label"]: row["score"] for row in scores}]))
"""


@pytest.mark.slow
def test_a_calibrator_is_pushed_and_read_back(tmp_path):
    """With the model, named in its card; the pipeline of the repository's id divides by it."""
    code = PUSH.replace("push_to_hub=", 'calibration_method="density", push_to_hub=')
    code = code.format(tests=SUPPORT, out=str(tmp_path / "out"), early=True)
    with Hub() as hub:
        result = run(tmp_path, code, hub)
        assert result.returncode == 0, result.stderr[-3000:]
        files = hub.repos["tester/tiny"]
        assert {"calibrator.json", "calibrator.safetensors"} <= files.keys()
        assert "`calibrator.json` and `calibrator.safetensors` hold" in files["README.md"].decode()
        temperature = json.loads(files["config.json"])["calibration"]["temperature"]
        remote = run(tmp_path, SERVE, hub)
    assert remote.returncode == 0, remote.stderr[-3000:]
    kind, by, scores = json.loads(remote.stdout.splitlines()[-1])
    assert kind == "CalibratedZeroShotPipeline"
    scaled = np.array(json.loads((tmp_path / "logits.json").read_text())) / temperature / by
    expected = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    assert [scores[name] for name in ("zero", "one", "two", "three")] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_refused_token_is_an_error_before_the_training(tmp_path):
    with Hub() as hub:
        result = push(tmp_path, hub, token="hf_bad")
    assert result.returncode == 1
    assert "Expected to create or open 'tester/tiny' on the Hub, got: " in result.stderr
    assert "hf auth login" in result.stderr
    assert "trained" not in result.stdout
    assert "hf_bad" not in result.stdout + result.stderr


@pytest.mark.parametrize("name", ["push_to_hub", "init_hf_repo"])
def test_a_lost_connection_is_said_with_the_cure(make_trainer, monkeypatch, name):
    trainer = make_trainer()
    trainer.hub_model_id = "tester/tiny"

    def fail(*args, **kwargs):
        raise HTTPError("Connection refused")

    places = {"push_to_hub": "carot_hf.hub.publisher.upload", "init_hf_repo": "transformers.Trainer.init_hf_repo"}
    monkeypatch.setattr(places[name], fail)
    kinds = {"push_to_hub": (RuntimeError, "call `push_to_hub` again"), "init_hf_repo": (ValueError, "HF_ENDPOINT")}
    kind, cure = kinds[name]
    with pytest.raises(kind, match=f"got: Connection refused .*{cure}"):
        getattr(trainer, name)()


@pytest.mark.slow
def test_a_push_that_fails_for_good_loses_nothing_and_can_be_repeated(tmp_path):
    """Then: a name of its own, private, by a token that was passed; uncalibrated, then calibrated with the teacher."""
    with Hub(failures=10**6) as hub:
        out, tests = tmp_path / "out", SUPPORT
        code = AGAIN.format(tests=tests, out=str(out), token=GOOD_TOKEN, endpoint=hub.endpoint)
        result = run(tmp_path, code, hub, token="hf_bad")
        assert result.returncode == 0, result.stderr[-3000:]
        assert "failed: Expected to push to 'tester/out', got: " in result.stdout
        assert f"`hf upload tester/out {out}" in result.stdout
        assert "An uncalibrated model is pushed" in result.stderr
        asked = hub.created[0]
        assert asked["id"] == "tester/out"
        assert asked.get("visibility") == "private" or asked.get("private") is True  # by version of huggingface_hub
        files, early = hub.repos["tester/out"], hub.repos["tester/early"]
        first, second = (before for before in hub.history if before[0] == "tester/out")
        card = first[1]["README.md"].decode()
        assert "**These weights were not evaluated**" in card
        assert "**No temperature is in the weights**" in card
        assert "license: mit" in card
        assert "teacher" not in "".join(first[1])
        assert second[1] == files
        for name, content in files.items():
            assert name == ".gitattributes" or content == (out / name).read_bytes(), name
        card = files["README.md"].decode()
        assert 'model="tester/out"' in card
        assert "`teacher/` holds the teacher" in card
        student, teacher = (load_tensors(files[name + "model.safetensors"]) for name in ("", "teacher/"))
        assert student.keys() == teacher.keys()
        assert any((student[name] != teacher[name]).any() for name in student)
        assert not any(name.endswith((".bin", ".pt", ".pth")) for name in early)
        assert "**No temperature is in the weights**" in early["README.md"].decode()
        for _, tree in hub.history:
            assert GOOD_TOKEN.encode() not in b"".join(tree.values())
    lost = run(tmp_path, PUSH.format(tests=tests, out=str(tmp_path / "new"), early=True), hub)
    assert lost.returncode == 1
    assert "ValueError: Expected to create or open 'tester/tiny' on the Hub" in lost.stderr
    assert "Check the connection and HF_ENDPOINT" in lost.stderr
    assert "trained" not in lost.stdout


@pytest.mark.slow
def test_of_two_processes_one_pushes(tmp_path):
    with Hub() as hub:
        result = push(tmp_path, hub, processes=2)
        assert result.returncode == 0, result.stderr[-3000:]
        assert len(re.findall(r"trained(?! +\d)", result.stdout)) == 2, "each says so; the log's line has a time"
        assert (len(hub.created), len(hub.commits)) == (1, 1)
        assert "2 processes" in hub.repos["tester/tiny"]["README.md"].decode()


@pytest.mark.slow
def test_the_script_pushes_under_accelerate_and_names_its_base_model(tmp_path):
    """The start model comes from the same Hub; the token is an option, and no file holds it."""
    with Hub() as hub:
        hub.repos["tester/clip"] = {path.name: path.read_bytes() for path in CLIP.iterdir()}
        script = str(ROOT / "examples" / "finetune_imagenet.py")
        options = ["--suite", "digits", "--output_dir", str(tmp_path / "out"), "--max_steps", "3", "--use_cpu"]
        options += ["--model_name_or_path", "tester/clip", "--push_to_hub", "--hub_token", GOOD_TOKEN]
        launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
        result = start(tmp_path, [*launch, script, *options, "--report_to", "tensorboard"], hub, token="")
        assert result.returncode == 0, result.stderr[-3000:]
        assert len(hub.commits) == 1
        files = hub.repos["tester/out"]
    assert not any("tfevents" in name for name in files)  # they stay here, and hold no secret either
    (events,) = [path.read_bytes() for path in (tmp_path / "out").rglob("*tfevents*") if b"args" in path.read_bytes()]
    assert GOOD_TOKEN.encode() not in events
    assert str(tmp_path).encode() not in events
    assert GOOD_TOKEN.encode() not in b"".join(files.values())
    assert str(tmp_path).encode() not in files["README.md"] + files["metrics.json"]
    card = ModelCard(files["README.md"].decode(), ignore_metadata_errors=False)
    suite = load_suite("digits")
    assert card.data.base_model == "tester/clip"
    assert (card.data.pipeline_tag, card.data.model_name) == ("zero-shot-image-classification", "out")
    metrics = json.loads(files["metrics.json"])["metrics"]
    for result in card.data.eval_results:
        key = f"eval_{result.dataset_name}_{result.metric_type}{'' if result.metric_type == 'accuracy' else '_ts'}"
        assert result.metric_value == pytest.approx(metrics[key], abs=1e-6), key
    assert {result.dataset_name for result in card.data.eval_results} == {suite.test.name, *suite.shifts}
    command = "python finetune_imagenet.py --suite digits --output_dir .../out --max_steps 3 --use_cpu "
    assert command + "--model_name_or_path tester/clip --push_to_hub --hub_token ..." in card.text
    assert set(suite.templates) <= set(card.text.splitlines())
    assert {json.dumps(name) for name in suite.class_names} <= set(card.text.splitlines())
    assert "![Reliability diagrams of each set](eval_reliability.png)" in card.text
    assert files["eval_reliability.png"].startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_from_the_hub_is_complete_at_each_commit_and_goes_on(tmp_path, processes):
    """`last-checkpoint` as it was after the second step, written to disk by whoever downloads it."""
    with Hub() as hub:
        values = {"tests": SUPPORT, "out": str(tmp_path / "run")}
        result = run(tmp_path, GO_ON.format(**values, push=True, resume=None), hub, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
        trees = [tree for _, tree in hub.history if any(name.startswith("last-checkpoint/") for name in tree)]
        steps = []
        for tree in trees:
            folder = tmp_path / f"after-{len(steps)}" / "last-checkpoint"
            for name, content in tree.items():
                if name.startswith("last-checkpoint/"):
                    path = folder / name.removeprefix("last-checkpoint/")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
            assert damage_of(folder) is None
            assert (folder / "rng_state_1.pth").exists() == (processes == 2)
            steps.append(json.loads((folder / "trainer_state.json").read_text())["global_step"])
        assert sorted(set(steps)) == [1, 2, 3]
        start = str(tmp_path / f"after-{steps.index(2)}" / "last-checkpoint")
        values["out"] = str(tmp_path / "again")
        result = run(tmp_path, GO_ON.format(**values, push=False, resume=start), hub, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
    for name in ("model.safetensors", "teacher.safetensors"):
        one, two = ((tmp_path / folder / "checkpoint-3" / name).read_bytes() for folder in ("run", "again"))
        assert one == two, name
