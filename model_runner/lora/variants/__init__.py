"""Variants: what PEFT's options add to a format (DoRA, rsLoRA, biases, ...), each with its options and tensor parts."""
