"""The data of one step: chunks, layout, batch, the table of rows, and the KV pool."""
