"""The scheduler: who runs when, on which rows, pages and lanes. Numbers only: no text, no tensors, no torch.

serve      sockets and the clock, one loop
core       handle, plan, apply, check              planner      one step
custody    adapters from their load to gone        loading      which are read from disk, and which go for them
admission  who gets in, waits or leaves            preemption   who gives way
books      all tables, and the audit:
           waiting, running, lanes, directory (names and copies), host_tier, residency (rank_pages), kv, stats,
           and what they hold: adapter, request
"""
