"""The gallery: a page in the browser that samples from a pipeline."""
