"""The HTTP door: typed bodies in, answers and server-sent events out. Knows the front end, no scheduler, no socket."""
