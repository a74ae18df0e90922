"""The command ``carot_hf``: one word for each thing people do with a CLIP."""
