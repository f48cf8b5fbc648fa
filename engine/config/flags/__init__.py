"""The command line: its parser, and the flags by group. Each help text ends with the default in parentheses."""
