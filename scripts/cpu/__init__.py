"""The parts of `scripts/bench_cpu.py`: loads and their floors, the linears alone, results and their plot."""
