"""The scheduler in virtual time: the pure core, a machine that only takes time, and traces of what is asked when.

    trace.jsonl --> Fleet --> Router --> Replica: Scheduler <--messages--> Machine (step times from a profile)
                                            '--> Journal --> Report: percentiles, fairness, a table, a plot

Nothing here is used in serving.
"""
