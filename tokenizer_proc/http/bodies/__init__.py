"""Request bodies: decoding, the tables of fields, chat messages and prompts."""
