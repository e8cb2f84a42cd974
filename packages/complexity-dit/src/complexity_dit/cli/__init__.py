"""The commands of `complexity-dit`."""
