"""C++ functions for this CPU, compiled by a niced child while the runner serves, and how they are found and called."""
