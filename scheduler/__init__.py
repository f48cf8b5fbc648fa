"""The scheduler: decides which requests run in the next step, on which rows, pages and lanes. Does not use torch.

server      sockets, the clock and the main loop     core        the entry points: handle, plan, apply, check
state       all tables                               audit       asserts that they agree
batching    plan of a step, preemption, isolation    results     applies the results of a step
loading     loads to the host, fills to the device   admission   how requests enter, wait and leave, and why they wait
requests    the queue, the rows, order, starvation   adapters    names, copies, host and device cache, lanes
kv_cache    the block pool and the radix tree        simulate    the scheduler in virtual time
stats       counters                                 snapshot    the Stats message
progress    updates in messages of bounded size      types       lane keys, orders, radix nodes
"""
