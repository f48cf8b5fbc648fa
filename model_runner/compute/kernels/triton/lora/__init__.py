"""The LoRA kernels: shrink and expand, their tiling and the segments they read."""
