"""The scheduler: which requests run in the next step, on which rows, pages and lanes. No text, no tensors, no torch.

server      sockets and the clock, one loop          core        handle, plan, apply, check
state       all tables, and their audit              admission   how requests enter, wait and leave
batching    the next step, preemption, isolation     loading     loads to the host, fills into rank pages
requests    the queue, the rows, order, starvation   adapters    names, copies, host and device memory, lanes
kv_cache    the block pool and the radix tree        simulate    the scheduler in virtual time
stats       counters                                 types       lane keys, orders, radix nodes
unloading   how adapters leave                       wait_reasons   why a request waits
"""
