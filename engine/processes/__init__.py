"""Starts, watches and stops processes: the parent's and the child's side, and the supervisor of all children."""
