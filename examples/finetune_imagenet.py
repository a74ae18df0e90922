"""Fine-tune CLIP, judge it under shift, calibrate it and save it: `carot_hf train` as a script.

    accelerate launch examples/finetune_imagenet.py --suite digits --preset carot --output_dir out/carot

--help shows the options, --help_all those of TrainingArguments, too.
"""

from carot_hf.cli.main import script

if __name__ == "__main__":
    script("train")
