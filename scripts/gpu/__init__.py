"""The parts of `scripts/gpu_check`: a grid of kernel measurements, peers' kernels beside ours, an 8B-shaped model."""
