"""The parts of `scripts/bench_serving.py`: workload, client, loops and report.

Works with every server that has OpenAI's completions over HTTP.
"""
