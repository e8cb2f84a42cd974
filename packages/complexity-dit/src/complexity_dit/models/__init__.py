"""The networks: transformer with its tokens and adapters, autoencoders, and how they are read."""
