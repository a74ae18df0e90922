"""The tables and figures of the CaRot paper, and what came after it: `carot_hf tables` as a script.

python examples/reproduce_tables.py --suite digits --seeds 5              # 40 to 55 minutes on two cores
python examples/reproduce_tables.py --suite digits --seeds 1 --quick      # shorter runs: about 4 minutes
"""

from carot_hf.cli.main import script

if __name__ == "__main__":
    script("tables")
