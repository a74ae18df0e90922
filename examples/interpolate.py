"""WiSE-FT, the models on the line from a zero-shot to a fine-tuned one: `carot_hf interpolate` as a script.

python examples/interpolate.py --fine_tuned out/carot --suite digits --output_dir out/wise
"""

from carot_hf.cli.main import script

if __name__ == "__main__":
    script("interpolate")
