"""Norms, gates, rotary embedding and KV store: one base class and its backends for CUDA and CPUs."""
