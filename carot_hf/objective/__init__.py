"""What is minimised: the losses, the whole batch over all processes, and the gradient cache."""
