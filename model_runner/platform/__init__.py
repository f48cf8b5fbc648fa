"""The machine: device and dtype, child processes, compilations, this rank's shard."""
