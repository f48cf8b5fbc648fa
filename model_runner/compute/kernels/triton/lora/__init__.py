"""The LoRA kernels shrink and expand, their tiling, and the table of work that they read."""
