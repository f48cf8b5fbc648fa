"""PEFT formats: one file declares one peft_type, from its options and tensor parts to its place in the normal form.

A new format is a file here and a line in the registry. Errors are AdapterErrors whose message begins with the part at
fault (a file, an option, a tensor); the adapter store puts the adapter's name in front.
"""
