"""Admission: what a request needs before it can run, how it is queued, admitted and ended, and adapter unloads."""
