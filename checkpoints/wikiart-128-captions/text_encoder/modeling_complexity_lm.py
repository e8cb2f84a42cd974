from complexity_lm import DeepModel  # noqa: F401
