"""Request bodies: decoding, field tables, chat messages and prompts."""
