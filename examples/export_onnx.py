"""A saved or pushed model as an ONNX file or a classifier: `carot_hf export` as a script.

python examples/export_onnx.py --model out/carot --suite digits --output out/carot.onnx
"""

from carot_hf.cli.main import script

if __name__ == "__main__":
    script("export")
