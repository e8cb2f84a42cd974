"""What both trainers share besides the model: files, checkpoint folders, logs, worker errors.

Standard library and torch only; `import inl_core` loads none of it.
"""
