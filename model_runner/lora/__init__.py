"""LoRA: sites, the normal form of adapters, rank pages and lanes, and the backends that compute deltas."""
