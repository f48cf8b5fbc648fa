"""The parts of `scripts/bench_cpu.py`: loads and their floors, the linears by themselves, results and their picture."""
