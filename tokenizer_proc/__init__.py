"""The tokenizer process: tokenizing, adapter names and tenants, with an HTTP and a ZeroMQ server on one front end.

It handles text and clients; KV pages, rows and tensors are left to the scheduler and the model runner.
"""
