"""The parts of `scripts/bench_cpu.py`: loads and their floors, the time of the linears, results and their plot."""
