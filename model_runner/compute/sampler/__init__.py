"""From logits to tokens: vectorised over rows, on the device, and the same for a row in any batch.

The order of operations, each on the result of the one before:

    logits -> logit_bias -> min_tokens masks end ids -> repetition penalty (prompt and output)
           -> presence and frequency penalty (output only) -> temperature -> top_k -> top_p -> min_p -> draw

Reported log-probabilities are of the logits as the model made them, before all of this. Knows tokens, rows and
positions; knows nothing of text, of the model or of pages.
"""
