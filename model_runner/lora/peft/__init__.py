"""Converts PEFT adapters from files to the normal form: config, targets, tensor names, conversion."""
