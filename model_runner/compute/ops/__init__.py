"""Small operations between the matmuls, each in one pass where a device has kernels: one base class, its backends."""
