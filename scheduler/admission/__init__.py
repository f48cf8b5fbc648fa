"""Admission: what a request needs before it can run, how it enters and leaves, and how adapters are unloaded."""
