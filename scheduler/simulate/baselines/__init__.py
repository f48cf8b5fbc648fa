"""Schedulers by the rules of other engines, to compare with."""
