"""Triton kernels, one file per operation; used by `inl_core.ops` only.

Importing this package imports no kernel: triton is missing on some platforms, and its interpreter
(``TRITON_INTERPRET=1``) must be selected before a kernel file is imported.
"""
