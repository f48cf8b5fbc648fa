"""LoRA memory on the device: rank pages, fills, uploads, norms and full weights."""
