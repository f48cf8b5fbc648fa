"""PEFT formats: each file declares one peft_type, its options, its tensor parts and how it becomes the normal form.

A new format is a file here and a line in the registry. Errors are AdapterErrors whose message begins with the part at
fault (a file, an option, a tensor); the adapter store puts the adapter's name before it.
"""
