"""The embedded client: Engine, and the connection to a running server that it uses."""
