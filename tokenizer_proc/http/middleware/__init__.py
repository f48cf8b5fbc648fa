"""What stands around every route: error bodies, the access log, backpressure."""
