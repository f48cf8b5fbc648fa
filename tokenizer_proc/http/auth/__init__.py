"""The rights of calls: API keys and the adapters they may use, and the checks for calls that change adapters."""
