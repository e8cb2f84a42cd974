"""Triton kernels, one file an operation; `inl_core.ops` is their only user.

Importing this package imports nothing: triton is missing on some platforms, and its interpreter
(``TRITON_INTERPRET=1``) has to be chosen before a kernel file is imported.
"""
