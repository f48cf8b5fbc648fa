"""The tables of body fields: which fields are accepted, which are ignored, and why the others are refused.

A field is treated as the first of these that applies: it asks for nothing (neutral.py), a field of the route's body
struct, a sampling parameter (`SPELLINGS_...`), ignored because it cannot change the output (`IGNORED`), accepted with a
value that has no effect (`NEUTRAL`), or refused by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from engine.messages import SamplingParams

MAX_SHOWN = 64
"""The number of characters of a client's field name that an error shows."""

SUBSTANCE = frozenset({"messages", "content", "prompt", "text", "input_ids", "tokens"})
"""The fields whose empty value is a prompt, and not the wish for a default."""

OFF_AT_ZERO = frozenset({"n", "best_of", "repetition_penalty", "truncate_prompt_tokens", "lora_int_id"})
"""The fields in which 0 stands for the default, because 0 itself has no meaning there."""

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",  # has no effect, because `tools` is refused
        "log_metrics",
    }
)

IGNORED_BY_ROUTE: dict[str, frozenset[str]] = {
    "/load_lora_adapter": frozenset({"lora_id"}),  # SGLang overwrites a client's value
}

NEUTRAL: dict[str, tuple[object, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "spaces_between_special_tokens": (True,),
    "length_penalty": (1.0,),
    "detokenize": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "include_reasoning": (True,),
}

REASONS = {
    "tools": "tool calls are not supported",
    "tool_choice": "tool calls are not supported",
    "functions": "function calls are not supported",
    "function_call": "function calls are not supported",
    "response_format": 'only {"type": "text"} is supported',
    "json_schema": "constrained output is not supported",
    "regex": "constrained output is not supported",
    "ebnf": "constrained output is not supported",
    "structural_tag": "constrained output is not supported",
    "structured_outputs": "constrained output is not supported",
    "guided_json": "constrained output is not supported",
    "guided_regex": "constrained output is not supported",
    "guided_choice": "constrained output is not supported",
    "guided_grammar": "constrained output is not supported",
    "modalities": "only text is supported",
    "audio": "only text is supported",
    "image_url": "only text is supported",
    "input_audio": "only text is supported",
    "file": "only text is supported",
    "image_data": "only text is supported",
    "audio_data": "only text is supported",
    "add_special_tokens": "a chat template writes its own special tokens",
    "suffix": "text after the completion is not supported",
    "prediction": "predicted outputs are not supported",
    "reasoning_effort": "reasoning levels are not supported",
    "verbosity": "verbosity levels are not supported",
    "web_search_options": "web search is not supported",
    "use_beam_search": "beam search is not supported",
    "chat_template": "the chat template is chosen at launch (--chat-template)",
    "input_embeds": "use text or input_ids",
    "lora_id": "name the adapter with lora_path",
}

_NOT_SPELT = {"logprobs", "prompt_logprobs", "token_ids_logprob"}  # each dialect has its own body fields for these
_SAME = {name: name for name in SamplingParams.__struct_fields__ if name not in _NOT_SPELT}

SPELLINGS_OPENAI = _SAME | {"max_completion_tokens": "max_tokens"}
SPELLINGS_NATIVE = _SAME | {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "no_stop_trim": "include_stop_str_in_output",
}


NEWER = {"max_completion_tokens": "max_tokens"}
"""Spellings that count where a client sends the older name of the same parameter too."""


def refusal(name: str, known: Iterable[str] = ()) -> str:
    """Returns the message that tells a client why the field `name` is refused; `known` are the fields of its place."""
    reason = REASONS.get(name)
    if reason is not None:
        return f"'{name}' is not supported here: {reason}"
    if name in NEUTRAL:
        return f"'{name}' is not supported here, other than {' or '.join(map(repr, NEUTRAL[name]))}"
    if len(name) > MAX_SHOWN:
        return f"unknown field '{name[:MAX_SHOWN]}...': it would be ignored, so it is refused"
    near = difflib.get_close_matches(name, sorted(known), n=1)
    advice = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown field '{name}': it would be ignored, so it is refused{advice}"
