"""The scheduler: which requests run in the next step, on which rows, pages and lanes. No text, no tensors, no torch.

server      sockets and the clock, one loop          core        handle, plan, apply, check
state       all tables                               audit       asserts that they agree
batching    the next step, preemption, isolation     results     applies the results of a step
loading     loads to the host, fills to the device   admission   how requests enter, wait and leave, and why they wait
requests    the queue, the rows, order, starvation   adapters    names, copies, host and device cache, lanes
kv_cache    the block pool and the radix tree        simulate    the scheduler in virtual time
stats       counters                                 snapshot    the Stats message
progress    updates in messages of bounded size      types       lane keys, orders, radix nodes
"""
