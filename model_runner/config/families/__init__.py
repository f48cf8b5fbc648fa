"""One module for each group of related model families, which translates their config.json into a ModelConfig."""
