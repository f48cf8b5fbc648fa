"""The generated parts of the documents: each module reads a registry of the code and returns Markdown."""
