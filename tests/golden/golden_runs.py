"""Short runs of every method on the digits, and all that they leave: what a move of the code must not change.

    python tests/golden/runs.py                 compare with tests/golden/values.json, bit for bit
    python tests/golden/runs.py --record        write it anew
    python tests/golden/runs.py flyp lora       some of the runs

Bits are those of one processor and one set of versions, which are recorded with them; elsewhere figures are compared
closely and hashes are not. Lives here while the code moves into packages, no longer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

import torch
from families import model_of, processor_of
from ports import reserved_port
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
VALUES = Path(__file__).with_name("values.json")
SCRIPT = ROOT / "examples" / "finetune_imagenet.py"
SHORT = ["--suite", "digits", "--use_cpu", "--max_steps", "6", "--save_steps", "3", "--logging_steps", "1"]
SHORT += ["--per_device_train_batch_size", "32", "--per_device_eval_batch_size", "512", "--save_strategy", "steps"]
SHORT += ["--teacher_update_every", "2", "--warmup_steps", "2", "--eval_strategy", "no", "--report_to", "none"]
SHORT += ["--dataloader_num_workers", "0", "--disable_tqdm", "True", "--reliability_diagrams", "False"]
PRESETS = ("ft", "ft-ls", "lp-ft", "flyp", "flyp-ls", "carot", "carot-2024", "tracer")
RUNS = {
    **{name: ["--preset", name] for name in PRESETS},
    "zero-shot": ["--zero_shot"],
    "lora": ["--preset", "carot", "--lora_rank", "2"],
    "lora-tracer": ["--preset", "tracer", "--lora_rank", "4", "--cross_norm_weight", "0"],
    "siglip": ["--preset", "carot", "--model_name_or_path", "{siglip}"],
    "cache": ["--preset", "carot-2024", "--contrastive_batch_size", "64"],
    "same-class": ["--preset", "flyp-ls", "--same_class", "positive"],
    "ece-criterion": ["--preset", "flyp", "--calibration_criterion", "ece"],
    "evaluated": ["--preset", "carot", "--eval_strategy", "steps", "--eval_steps", "3", "--load_best_model_at_end"],
    "two-processes": ["--preset", "carot", "--dataloader_drop_last", "False"],
}
PASSING = ("runtime", "per_second", "input_wait", "total_flos")  # what a log says of time
FACTS = ("suite", "suite_version", "suite_sha256", "names", "method", "seed", "steps", "calibration")


def probe() -> dict[str, str]:
    """What bits depend on: versions, and how this processor rounds."""
    generator = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()
    for rows, inner, columns in ((32, 16, 48), (7, 33, 5), (512, 64, 10), (128, 128, 128)):
        left, right = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
        product = left @ right
        for part in (product, product.softmax(-1), product.exp(), product.sum(0), torch.tanh(product)):
            digest.update(part.numpy().tobytes())
    import numpy
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "threads": str(torch.get_num_threads()),
        "rounding": digest.hexdigest(),
    }


def run(name: str, options: list[str], folder: Path) -> dict[str, object]:
    """Do one run in a process of its own; return what it left."""
    out = folder / name
    command = [sys.executable, str(SCRIPT)]
    if "{siglip}" in options:
        start = folder / "siglip-start"
        processor = processor_of("siglip2")
        model_of("siglip2", processor.tokenizer).save_pretrained(start)
        processor.save_pretrained(start)
        options = [str(start) if part == "{siglip}" else part for part in options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    with reserved_port() as port:
        if name == "two-processes":
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc_per_node",
                "2",
                "--master_port",
                str(port),
            ]
            command += [str(SCRIPT), "--ddp_backend", "gloo"]
        command += [*SHORT, *options, "--output_dir", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return left(out)


def left(out: Path) -> dict[str, object]:
    """All that a run left in its folder: files, hashes of tensors, logs, figures."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    report = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    checkpoints = sorted(out.glob("checkpoint-*"))
    logs = json.loads((checkpoints[-1] / "trainer_state.json").read_text(encoding="utf-8")) if checkpoints else {}
    hashes = {str(path.relative_to(out)): hash_of(load_file(path)) for path in files if path.suffix == ".safetensors"}
    for path in files:
        if path.name == "optimizer.pt":
            hashes[str(path.relative_to(out))] = hash_of(torch.load(path, weights_only=True))
    hashes |= {name: hash_of(report[name]) for name in ("bins", "bins_ts")}
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return {
        "files": [str(path.relative_to(out)) for path in files],
        "hashes": hashes,
        "log": [without_time(row) for row in logs.get("log_history", [])],
        "best": [logs.get("best_metric"), logs.get("best_global_step")],
        "calibration": config.get("calibration"),
        "report": {key: report[key] for key in FACTS},
        "metrics": without_time(report["metrics"]),
    }


def without_time(figures: dict[str, object]) -> dict[str, object]:
    """Figures but for those that no two runs share."""
    return {key: value for key, value in figures.items() if not any(part in key for part in PASSING)}


def hash_of(value: object) -> str:
    """A hash of a nested structure of tensors and plain values."""
    digest = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key in sorted(part, key=str):
                digest.update(repr(key).encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            for item in part:
                add(item)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()[:16]


def differences(before: object, now: object, place: str = "", *, bits: bool) -> list[str]:
    """Where two results differ; without ``bits`` figures are close and hashes are not looked at."""
    if isinstance(before, dict) and isinstance(now, dict):
        if before.keys() != now.keys():
            return [f"{place}: {sorted(before.keys() ^ now.keys())} on one side only"]
        if not bits and place.endswith("/hashes"):
            return []
        return [line for key in before for line in differences(before[key], now[key], f"{place}/{key}", bits=bits)]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [line for at, pair in pairs for line in differences(*pair, f"{place}/{at}", bits=bits)]
    if not bits and isinstance(before, float) and isinstance(now, float):
        return [] if math.isclose(before, now, rel_tol=0.05, abs_tol=0.02) else [f"{place}: {before} -> {now}"]
    return [] if before == now else [f"{place}: {before} -> {now}"]


def main(arguments: list[str]) -> int:
    """Record the runs, or compare them with those recorded."""
    record, names = "--record" in arguments, [name for name in arguments if not name.startswith("-")] or list(RUNS)
    known = json.loads(VALUES.read_text(encoding="utf-8")) if VALUES.exists() else {"probe": {}, "runs": {}}
    here = probe()
    bits = record or known["probe"] == here
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = json.loads(json.dumps(run(name, RUNS[name], Path(folder))))
            if record:
                known["runs"][name] = found
            said = differences(known["runs"][name], found, name, bits=bits)
            worst = max(worst, len(said))
            print(
                f"{name}: {'the same' if not said else f'{len(said)} differences'}", *said[:5], sep="\n  ", flush=True
            )
    if record:  # whole or not at all
        text = json.dumps({"probe": here, "runs": known["runs"]}, separators=(",", ":"), sort_keys=True)
        VALUES.write_text(text + "\n", encoding="utf-8")
    print(f"Compared {'bit for bit' if bits else 'closely: another processor or other versions'}.")
    return 1 if worst else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
