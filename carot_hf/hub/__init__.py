"""The model card, and what is published."""
