"""What surrounds a training: its folder, checkpoints, resuming, and what is said before the first step."""
