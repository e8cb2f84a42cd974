"""What both trainers need around a model: files, checkpoint folders, logs, dead workers.

Standard library and torch only. `import inl_core` loads nothing of it.
"""
