"""Evaluation: image sets, feature networks, distances, breakdowns and the report."""
