"""Starting, watching and ending processes: both sides of a child process, and the supervisor over all of them."""
