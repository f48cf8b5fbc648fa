"""Requests: the request itself, the waiting queue, the running rows, and the order of requests in both."""
