"""The command line: its parser, and the flags by group, with help texts that end with the default in parentheses."""
