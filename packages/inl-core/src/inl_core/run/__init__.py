"""What both trainers share besides the model: files, checkpoint folders, logs, worker errors.

Standard library and torch only, and PyYAML in `settings` and `commands`; `import inl_core` loads
none of it.
"""
