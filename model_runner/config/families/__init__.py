"""One module for each family of models: its config.json translated into a ModelConfig."""
