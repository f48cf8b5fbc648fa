"""The kernels' C++ sources, each beside the torch reference that it must agree with."""
