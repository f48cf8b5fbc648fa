"""Attention, the small operations between matmuls, the sampler, and the kernels that they call."""
