"""The layers of a decoder: linears, norms, rotary embeddings, attention, MLP, experts."""
