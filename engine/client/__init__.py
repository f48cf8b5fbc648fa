"""The embedded client: Engine, and the link to a server that it speaks over."""
