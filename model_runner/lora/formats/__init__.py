"""Adapter formats: each module turns the files of one format into the normal form (lora.adapter).

Errors are AdapterErrors whose message begins with the part at fault (a file, an option, a tensor); the store puts the
adapter's name in front.
"""
