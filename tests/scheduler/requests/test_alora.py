"""scheduler.requests.alora: comparison with a plain search by PEFT's rule, and with PEFT itself."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduler.requests.alora import find_invocation

TOKENS = st.lists(st.sampled_from([0, 1, 256, 257, 1 << 24, (1 << 31) - 1]), max_size=12)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(TOKENS, TOKENS.filter(bool))
@example([256, 256, 1], [1, 1])  # the invocation's bytes also occur across token bounds
@example([1, 1, 1], [1, 1])
@example([0, 0], [0])
def test_invocation_is_the_last_occurrence_at_token_bounds(prompt: list[int], invocation: list[int]) -> None:
    starts = [at for at in range(len(prompt)) if prompt[at : at + len(invocation)] == invocation]
    assert find_invocation(prompt, invocation) == (starts[-1] if starts else None)


def test_invocation_equals_that_of_peft() -> None:
    import peft
    import torch
    from peft.tuners.lora.variants import calculate_alora_offsets

    config = {"a": peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[3, 4])}
    for prompt in ([3, 4, 9], [3, 4, 3, 4, 5], [9, 3, 4], [3, 4], [4, 3], [3, 9, 4], [3, 3, 4, 3]):
        (offset,) = calculate_alora_offsets(config, "a", torch.tensor([prompt]))
        assert find_invocation(prompt, [3, 4]) == (None if offset is None else len(prompt) - offset)
