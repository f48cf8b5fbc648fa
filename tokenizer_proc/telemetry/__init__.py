"""Metrics and the error log."""
