"""Adapters of other trainers that have the same mathematics as PEFT's: options and tensors as PEFT would write them."""
