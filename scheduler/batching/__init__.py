"""Batching: plans the next step, orders admissions, preempts, isolates suspects after a crash, and overlaps steps."""
