"""The machine: device and dtype, child processes, compilations of kernels, this rank's shard."""
