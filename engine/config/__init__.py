"""The configuration: from flags, API keys and sizes to the config of each process."""
