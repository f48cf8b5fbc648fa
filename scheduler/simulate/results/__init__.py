"""What came out of a simulation: the journal of requests, the report and the plot."""
