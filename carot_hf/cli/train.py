"""``carot_hf train``: fine-tune CLIP, judge it under shift, calibrate it and save it.

    carot_hf train --suite digits --preset carot --output_dir out/carot
    accelerate launch -m carot_hf train --suite digits --preset carot --output_dir out/carot

takes about a minute on two cores without a GPU and prints one row a set: accuracy, ECE, and ECE after the temperature
that was fitted on the validation set. Any flag of TrainingArguments works. What is given on the command line goes
before what the suite recommends, which goes before the preset. An interrupted run goes on, to the same weights bit for
bit, with the same command and --resume_from_checkpoint.

In the output folder (default: out/<preset>, out/zero_shot): the calibrated model and its processor (load them with
AutoModel.from_pretrained, or in the stock pipeline "zero-shot-image-classification"), metrics.json,
eval_reliability.png, learning_curves.png, local.json (places on this machine; never published), and checkpoint-<step>
folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HELP = """usage: carot_hf train [--suite S] [--preset P] [--output_dir D] [options]

Fine-tune CLIP, judge it under shift, calibrate it and save it. Also: accelerate launch -m carot_hf train ...
The command line goes before --config, that before what the suite recommends, that before the preset.

data
  --suite S                      digits, imagenet (default), a benchmark (pacs, ...), a YAML file, or a folder of images
  --data_root D                  folder of local copies of what is on the Hub
  --home D, --held_out D         domain of a benchmark that is trained on, or that is not
  --streaming, --shifts, --partial   see --help_all
method
  --preset P                     carot (default), carot-2024, tracer, flyp, flyp-ls, ft, ft-ls, lp-ft,
                                 static, fd, l2-sp, dive, lipsum, car-ft
  --model_name_or_path M         checkpoint to start from; default: the suite's own
  --label_smoothing_factor E     epsilon of the -ls presets
  --lora_rank R                  train LoRA adapters of this rank only; default: all weights
  --zero_shot                    do not train: evaluate and calibrate the start model
training
  --learning_rate, --num_train_epochs, --max_steps, --weight_decay, --warmup_steps, --seed, --bf16
  --per_device_train_batch_size B   default: 512, or what makes 8 steps an epoch of a small set
  --contrastive_batch_size N     a larger batch in the memory of a small one
  --eval_strategy epoch          evaluate while it trains: the validation set, with --eval_sets all every set
  --early_stopping_patience N    stop after N evaluations without progress
  --resume_from_checkpoint       go on from the newest checkpoint in the output folder
calibration
  --calibration_method M         temperature (default), perturbed, density: measured up to this one, which is saved
  --n_bins N                     confidence bins of the ECE; default: 10
output
  --output_dir D                 default: out/<preset>
  --overwrite_output_dir         replace a finished run that is there
  --push_to_hub, --hub_model_id, --report_to, --logging_steps, --save_steps
  --config FILE                  YAML with any of these options
  --use_cpu                      leave accelerators alone
  --help_all                     all options, those of TrainingArguments included
"""


def main(argv: Sequence[str]) -> dict[str, Any] | None:
    """Run the command; return what metrics.json holds."""
    words = list(argv)
    if "-h" in words or "--help" in words:
        print(HELP)
        return None
    if "--help_all" in words:
        from .train_options import parser_of

        parser_of().print_help()
        return None
    from .training import main as train

    return train(words)
