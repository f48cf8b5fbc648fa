"""KV pages: their reference counts (block_pool), the tokens in them (radix_cache), and a request's pages (manager)."""
