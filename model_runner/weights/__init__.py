"""Reads checkpoint files and fills the model's weights from their tensors."""
