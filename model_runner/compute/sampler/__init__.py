"""Samples tokens from logits on the device, for all rows at once; a row's result does not depend on its batch.

The order of operations, each on the result of the previous one:

    logits processors    allowed_token_ids mask the others -> logit_bias -> min_tokens masks end ids
                         -> repetition penalty (prompt and output) -> presence and frequency penalty (output only)
                         -> bad_words mask their last tokens
    sampling             temperature -> top_k -> top_p -> min_p -> draw

Reported log-probabilities are those of the model's own logits, before all of these operations. Does not depend on
text, models or KV pages.
"""
