"""The tokenizer process: text, adapter names and tenants. HTTP and ZeroMQ servers on top of one front end.

It knows text and clients; it knows no KV pages, rows or tensors.
"""
