"""Measurements: every number in README and docs is a row that one of these scripts wrote."""
