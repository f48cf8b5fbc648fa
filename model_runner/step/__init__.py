"""One step on the host: layout, batch, rows, KV pool, and how device work is recorded."""
