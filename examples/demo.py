"""Zero-shot, FLYP and CaRot side by side on real images, without network or GPU: `carot_hf demo` as a script.

python examples/demo.py                # what `make demo` runs: one seed, about two minutes on two cores
"""

from carot_hf.cli.main import script

if __name__ == "__main__":
    script("demo")
