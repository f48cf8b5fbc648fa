"""The parts of `scripts/bench_serving.py`: workload, client, loops and report.

Knows OpenAI's completions over HTTP and nothing of the server behind it.
"""
