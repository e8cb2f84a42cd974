"""Names of the files that our folders have beside those of diffusers."""

DATA_FILE = "data.json"
"""In a pipeline or adapter folder: the `DataConfig` that it was trained with."""

ADAPTER_FILE = "adapter.json"
"""In an adapter folder: which pipeline it belongs to."""
