"""Batching: the contents of the next step, the order of admissions, preemption, isolation, and overlapping steps."""
