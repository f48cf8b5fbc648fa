"""Loading: which adapters are read from disk, which are filled into rank pages, and what becomes of them."""
