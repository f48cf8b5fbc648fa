"""LoRA backends: one base class, and how each computes the deltas of a step."""
