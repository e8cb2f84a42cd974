"""What tests of several folders share; `pythonpath` of the pytest settings makes it importable."""
