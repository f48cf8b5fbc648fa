"""Small pure functions as machine code, made by a niced child while the runner serves: `-m model_runner.compiled`."""
