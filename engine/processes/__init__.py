"""Starts, watches and stops processes: both sides of a child process, and the supervisor of all of them."""
