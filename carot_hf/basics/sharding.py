"""Whether a run splits the weights among its devices, by its arguments and by what a launcher has set."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def sharding(args: Any) -> str | None:
    """Return what splits the weights, "FSDP" or "DeepSpeed ZeRO-3"; ``None``: nothing does.

    Args:
        args: ``TrainingArguments``.
    Raises:
        ValueError: If there is no such configuration of DeepSpeed.
    """
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        return "FSDP"
    zero = getattr(args, "hf_deepspeed_config", None)
    if zero is not None and zero.is_zero3():
        return "DeepSpeed ZeRO-3"
    return "DeepSpeed ZeRO-3" if _zero_stage(args.deepspeed) == 3 else None


def _zero_stage(config: Any) -> int:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        config = config or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if stage is not None and not config:
            return int(stage)
    if isinstance(config, str) and not config.startswith("{") and not Path(config).is_file():
        raise ValueError(f"Expected a DeepSpeed config, got no such file: {config}. Correct the path in `deepspeed`.")
    if isinstance(config, str):
        config = json.loads(config if config.startswith("{") else Path(config).read_text(encoding="utf-8"))
    return int((config or {}).get("zero_optimization", {}).get("stage", 0)) if isinstance(config, Mapping) else 0
