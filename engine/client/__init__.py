"""The embedded client: Engine, and the connection to a server that it speaks over."""
