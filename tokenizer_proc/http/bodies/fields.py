"""The tables of body fields: which fields are accepted, which are ignored, and why the others are refused.

A field is treated as the first of these that applies: a field of the route's body struct, a sampling parameter
(`SPELLINGS_...`), ignored because it cannot change the output (`IGNORED`), accepted with a value that has no effect
(`NEUTRAL`), or refused by name. A field that is null counts as absent.
"""

from __future__ import annotations

from engine.messages import SamplingParams

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
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": ([], ["text"]),
    "suffix": ("",),
    "echo": (False,),
    "add_special_tokens": (False,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_hidden_states": (False,),
    "return_token_strs": (False,),
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
    "prompt_logprobs": "use /v1/completions with echo and logprobs",
    "stop_regex": "use stop or stop_token_ids",
    "input_embeds": "use text or input_ids",
    "lora_id": "name the adapter with lora_path",
}

_NOT_SPELT = {"logprobs", "prompt_logprobs"}  # each dialect has its own body fields for these two
_SAME = {name: name for name in SamplingParams.__struct_fields__ if name not in _NOT_SPELT}

SPELLINGS_OPENAI = _SAME | {"max_completion_tokens": "max_tokens"}
SPELLINGS_NATIVE = _SAME | {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "no_stop_trim": "include_stop_str_in_output",
}


def refusal(name: str) -> str:
    """Returns the message that tells a client why the field `name` is refused."""
    reason = REASONS.get(name)
    if reason is not None:
        return f"'{name}' is not supported here: {reason}"
    if name in NEUTRAL:
        return f"'{name}' is not supported here, other than {' or '.join(map(repr, NEUTRAL[name]))}"
    return f"unknown field '{name}': it would be ignored, so it is refused"
