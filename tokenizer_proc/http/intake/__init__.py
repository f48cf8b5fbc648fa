"""How requests come in: connections, bodies piece by piece, the bounds on their size, shape, speed and memory."""
