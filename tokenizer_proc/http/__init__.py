"""The HTTP server: typed request bodies in, JSON responses and server-sent events out, on top of the front end."""
