"""Requests: the record, the waiting queue, the running rows, and the rules of order among them."""
