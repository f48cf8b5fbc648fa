"""KV pages: reference counts (block_pool), prefix lookup (radix_cache), and requests' pages (kv_cache_manager)."""
