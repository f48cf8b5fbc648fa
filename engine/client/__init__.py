"""The client library: Engine, and the connection to an engine's processes that it uses."""
