"""Sets of a suite measured, compared and drawn."""
