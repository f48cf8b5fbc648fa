"""Requests, the waiting queue, the running rows, and the schedule policies that order requests in both."""
