"""Measurements: the scripts write rows, and every number in README and docs is a row."""
