"""The link to the scheduler: the outbox, request ids, and what waiting requests wait for."""
