"""Work whose cost a client chooses: off the event loop, in turns of the tenants, dropped if its caller leaves."""
