"""The HTTP server: typed bodies in, answers and server-sent events out. Knows the front end, no scheduler."""
