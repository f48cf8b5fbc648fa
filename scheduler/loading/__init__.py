"""Loading: which adapters are loaded from disk, which are filled into rank pages, and how their states change."""
