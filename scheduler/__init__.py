"""The scheduler: who runs when, on which rows, pages and lanes. Numbers only: no text, no tensors, no torch.

serve      sockets and the clock, one loop
core       handle, plan, apply, check              planner      one step
turns      who is admitted next, who made to wait  preemption   which row or lane gives way
filling    which copies get rank pages, and when   loading      which are read from disk, and which go for them
custody    adapters from their load to gone        unloading    how names and copies leave
admission  who comes in, waits or leaves           reasons      why somebody waits
books      all tables, and the audit:
           waiting, running, lanes, directory (names and copies), host_tier, residency (rank_pages), kv, stats,
           order (whose place is before whose), overtaking, and what they hold: adapter, request
"""
