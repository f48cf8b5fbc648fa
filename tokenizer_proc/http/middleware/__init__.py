"""The middlewares around every route: access log, backpressure, error bodies."""
