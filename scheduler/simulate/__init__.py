"""A simulator: runs the real scheduler core in virtual time, on simulated machines and traces of requests.

    trace.jsonl --> Fleet --> Router --> Replica: Scheduler <--messages--> Machine (step times from a profile)
                                            '--> RequestLog --> report: percentiles, fairness, a table, a plot

Serving does not import this package.
"""
