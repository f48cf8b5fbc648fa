"""Rights of calls: keys and their adapters, and where adapters may be changed from."""
