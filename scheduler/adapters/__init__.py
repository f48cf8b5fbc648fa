"""Adapters: names, copies in host and device memory, rank pages and lanes. Tables only."""
