"""KV pages: who holds which. Nothing here knows what is in them."""
