"""From a command line to what each process reads: arguments, flags, API keys, sizes, and one section a process."""
