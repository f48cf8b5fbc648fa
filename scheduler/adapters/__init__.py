"""The tables of adapters: their names, their copies in host and device memory, rank pages and lanes."""
