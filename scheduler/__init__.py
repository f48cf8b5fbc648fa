"""The scheduler: who runs when, on which rows, pages and lanes. Numbers only: no text, no tensors, no torch.

serve      sockets and the clock, one loop
core       handle, plan, apply, check              planner      one step
admission  who gets in, waits or leaves            preemption   who gives way
books      all tables, and the audit:
           waiting, running, lanes, residency (rank_pages), kv, stats, and the request itself
"""
