"""Paintings: sources, splits with labels, cached latents, and the embedded art set."""
