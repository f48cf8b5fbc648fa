"""The model runner process: it holds weights, KV cache and adapters, and executes the scheduler's steps."""
