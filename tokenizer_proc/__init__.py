"""The tokenizer process: text, names and tenants. Doors (HTTP, ZeroMQ) above, one front end, a scheduler below.

It knows words and clients; it knows no pages, rows or tensors.
"""
