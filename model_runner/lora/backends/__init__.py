"""LoRA backends: the base class, and the implementations that compute the deltas of a step."""
