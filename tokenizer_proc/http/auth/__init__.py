"""Who may call what: access of keys to adapters, and administration."""
