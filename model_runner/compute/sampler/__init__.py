"""From logits to tokens: vectorised over rows, on the device, and the same for a row in any batch.

The order of operations, each on the result of the one before:

    logits processors    logit_bias -> min_tokens masks end ids -> repetition penalty (prompt and output)
                         -> presence and frequency penalty (output only)
    sampling             temperature -> top_k -> top_p -> min_p -> draw

Reported log-probabilities are those of the model's own logits, before all of this. Does not know text, models or KV
pages.
"""
