"""The parts of `scripts/bench_serving.py`: what is asked, how it is sent, when, and what comes out.

Knows OpenAI's completions over HTTP and nothing of the server behind it.
"""
