"""KV pages: who refers to them (pages), which tokens they hold (radix), and what a request is given (cache)."""
