"""What a decoder is made of: linears, norms, rotary embeddings, attention, MLP."""
