"""What computes: attention, small operations, the sampler, and kernels under them."""
