"""Training: losses, optimizers, the step, checkpoints, and the loop that joins them."""
