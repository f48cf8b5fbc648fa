"""Batching: what goes into the next step, who is admitted, who makes way, and when steps overlap."""
