"""Training: the loop, its state, the objective, the optimizer, and what is written on the way."""
