from complexity_dit import TinyAutoencoder  # noqa: F401
