"""One step on the host: layout, batch, rows, KV pool, and the capture of device work for replay."""
