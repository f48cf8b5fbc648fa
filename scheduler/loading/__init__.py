"""DiskLoader: which adapters are read from disk, filled into rank pages, and unloaded."""
