"""Attacks on a running server, by kind, beside the streams of another tenant whose tokens and gaps are watched."""
