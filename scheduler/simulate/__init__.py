"""The scheduler in virtual time: the real core, a machine that only takes time, and traces of requests.

    trace.jsonl --> Fleet --> Router --> Replica: Scheduler <--messages--> Machine (step times from a profile)
                                            '--> RequestLog --> report: percentiles, fairness, a table, a plot

Nothing here is used in serving.
"""
