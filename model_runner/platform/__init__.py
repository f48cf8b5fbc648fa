"""The machine: device and dtype, child processes, a counter of kernel compilations, this rank's shard."""
