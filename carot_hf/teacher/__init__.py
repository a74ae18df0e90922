"""The teacher: a slowly moving average of the student's weights, when it moves, and its file."""
