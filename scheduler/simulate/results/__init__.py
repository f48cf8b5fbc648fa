"""The results of a simulation: the log of requests, the report and the plot."""
