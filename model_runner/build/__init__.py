"""How a runner is built from its config: what fits into memory, and the parts, attached to one another."""
