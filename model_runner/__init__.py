"""The model runner: weights, KV cache, adapters and sampling as tensors. It obeys the scheduler's steps."""
