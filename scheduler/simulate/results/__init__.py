"""The results of a simulation: the request log, the report and the plot."""
