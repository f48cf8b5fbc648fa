"""Validation of a client's parameters, and their split by use: sampling, stopping and text options.

Parameters are not checked again afterwards. Every error names the field it is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from engine.errors import InvalidRequest
from engine.messages import Sampling, SamplingParams, Stopping
from tokenizer_proc.requests.token_limits import check_some_token_is_left
from tokenizer_proc.text.generation_config import MAX_PENALTY, MAX_TEMPERATURE, GenerationConfig
from tokenizer_proc.text.stop_patterns import check_patterns

MAX_N = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOKEN_IDS = {"stop_token_ids": 4096, "logit_bias": 16384, "allowed_token_ids": 65536, "token_ids_logprob": 64}
MAX_COPIES = 1 << 18  # token ids of these lists for all answers of a call together, as each answer is sent its own
MAX_LOGPROBS = 20
MAX_BIAS = 100.0
PRIORITIES = 1 << 31
SEEDS = 1 << 63


class TextOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The output processor's parameters. `stop` and `stop_regex` end a choice only after `min_tokens` tokens.

    With `scores_only` (max_tokens 0) the one token that the scheduler generates is not part of the output.
    """

    stop: list[str] = []
    stop_regex: list[str] = []
    min_tokens: int = 0
    skip_special_tokens: bool = True
    include_stop: bool = False
    has_logprobs: bool = False
    token_ids_logprob: list[int] = []
    scores_only: bool = False


class ValidatedParams(msgspec.Struct, frozen=True, kw_only=True):
    """Validated parameters, grouped by the component that uses them. Choice i of `n` samples with seed + i."""

    n: int
    sampling: Sampling
    stopping: Stopping
    text: TextOptions

    def sampling_of(self, choice: int) -> Sampling:
        """Returns the sampling parameters of one choice. Only the first choice computes prompt log-probabilities."""
        return msgspec.structs.replace(
            self.sampling,
            seed=(self.sampling.seed + choice) % SEEDS,
            prompt_logprobs=self.sampling.prompt_logprobs if choice == 0 else -1,
        )


def validate_params(
    params: SamplingParams,
    *,
    generation_config: GenerationConfig,
    seed: int,
    prompt: Sequence[int],
    max_length: int,
    vocab_size: int,
    default_max_tokens: int | None,
    adapter: str | None = None,
    bad_words: Sequence[list[int]] = (),
) -> ValidatedParams:
    """Checks `params` for a prompt of token ids, and returns the validated parameters.

    `seed` is used if the client gives none. `adapter` is the name of an adapter with its own vocabulary, whose size
    `vocab_size` then is; None for the base's vocabulary. `bad_words` are the token ids of `params.bad_words`.

    Raises an InvalidRequest that names the field.
    """
    tokens = f"{vocab_size} tokens" if adapter is None else f"{vocab_size} tokens of adapter `{adapter}`"
    _check_prompt(prompt, max_length, vocab_size, tokens)
    _check_ranges(params)
    _check_ids(params, vocab_size, tokens)
    _check_stops(params.stop)
    check_patterns(params.stop_regex)
    check_copies([params])
    max_tokens = _max_tokens(params.max_tokens, default_max_tokens, len(prompt), max_length)
    scores_only = max_tokens == 0
    if scores_only:
        params, max_tokens = msgspec.structs.replace(params, min_tokens=0), 1
    _within("min_tokens", params.min_tokens, 0, max_tokens)
    end_ids = _end_ids(params, generation_config, vocab_size)
    check_some_token_is_left(params, end_ids, bad_words)
    return ValidatedParams(
        n=params.n,
        sampling=_sampling(params, generation_config, seed, end_ids, bad_words, vocab_size),
        stopping=Stopping(max_tokens, params.min_tokens, end_ids),
        text=TextOptions(
            stop=params.stop,
            stop_regex=params.stop_regex,
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
            include_stop=params.include_stop_str_in_output,
            has_logprobs=params.logprobs is not None,
            token_ids_logprob=params.token_ids_logprob,
            scores_only=scores_only,
        ),
    )


def check_copies(several: Iterable[SamplingParams]) -> None:
    """Raises InvalidRequest if the parameters of all answers of a call list too many token ids together.

    Also raises it for an `n` out of range, which would make the sums of a call meaningless.
    """
    copies = dict.fromkeys(MAX_TOKEN_IDS, 0)
    for params in several:
        _within("n", params.n, 1, MAX_N)
        for name in copies:
            copies[name] += params.n * len(getattr(params, name))
    largest = max(copies, key=copies.__getitem__)
    if sum(copies.values()) > MAX_COPIES:
        raise InvalidRequest(
            f"{largest}: the answers of one call take at most {MAX_COPIES} token ids of such lists together",
            param=largest,
        )


def check_priority(priority: int, has_meaning: bool) -> None:
    """Raises InvalidRequest for a priority that is out of range, or that is not 0 and would have no effect.

    `has_meaning` says whether the server's scheduling policy uses priorities.
    """
    _within("priority", priority, -PRIORITIES, PRIORITIES - 1)
    if priority and not has_meaning:
        raise InvalidRequest(
            "requests have priorities only with --schedule-policy priority: leave `priority` out, or at 0",
            param="priority",
        )


def _check_prompt(prompt: Sequence[int], max_length: int, vocab_size: int, tokens: str) -> None:
    if not prompt:
        raise InvalidRequest("the prompt is empty: give at least one token", param="prompt")
    if len(prompt) >= max_length:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens; this model's context is {max_length} tokens, "
            "and at least one must be left for the answer",
            param="prompt",
            code="context_length_exceeded",
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        bad = next(token for token in prompt if not 0 <= token < vocab_size)
        raise InvalidRequest(f"token id {bad} is not in the vocabulary of {tokens}", param="prompt")


def _max_tokens(asked: int | None, default: int | None, prompt: int, max_length: int) -> int:
    """Returns the length of the output at most; 0 if the prompt is only scored."""
    room = max_length - prompt
    if asked is None:
        return room if default is None else max(1, min(default, room))
    if asked < 0:
        raise InvalidRequest(f"max_tokens must be at least 0, got {asked}", param="max_tokens")
    if asked > room:
        raise InvalidRequest(
            f"this model's context is {max_length} tokens; {prompt} of the prompt and {asked} of the answer make "
            f"{prompt + asked}: shorten the prompt or ask for at most {room} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return asked


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:  # also refuses NaN
        raise InvalidRequest(f"{name} must be from {low} to {high}, got {value}", param=name)


def _check_ranges(params: SamplingParams) -> None:
    _within("n", params.n, 1, MAX_N)
    _within("presence_penalty", params.presence_penalty, -2, 2)
    _within("frequency_penalty", params.frequency_penalty, -2, 2)
    _within("repetition_penalty", params.repetition_penalty, 1 / MAX_PENALTY, MAX_PENALTY)
    _within("temperature", params.temperature, 0, MAX_TEMPERATURE)
    _within("min_p", params.min_p, 0, 1)
    _within("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    _within("prompt_logprobs", params.prompt_logprobs, 0, MAX_LOGPROBS)
    _within("seed", params.seed, -SEEDS, SEEDS * 2 - 1)
    _check_filters(params)


def _check_filters(params: SamplingParams) -> None:
    """Raises InvalidRequest for a `top_p` or `top_k` out of range. A `top_p` of 0 keeps the best token only."""
    _within("top_p", params.top_p, 0, 1)
    if params.top_k is not None and params.top_k < -1:
        raise InvalidRequest(f"top_k must be at least 1, or 0 or -1 for off, got {params.top_k}", param="top_k")


def _check_ids(params: SamplingParams, vocab_size: int, tokens: str) -> None:
    for name, most in MAX_TOKEN_IDS.items():
        ids = getattr(params, name)
        if len(ids) > most:
            raise InvalidRequest(f"{name} has {len(ids)} entries; at most {most} are taken", param=name)
        for token in ids:
            if not 0 <= token < vocab_size:
                raise InvalidRequest(f"{name}: token id {token} is not in the vocabulary of {tokens}", param=name)
    for bias in params.logit_bias.values():
        _within("logit_bias", bias, -MAX_BIAS, MAX_BIAS)


def _check_stops(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop takes at most {MAX_STOPS} strings, got {len(stops)}", param="stop")
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(f"a stop string has 1 to {MAX_STOP_CHARACTERS} characters", param="stop")


def _end_ids(params: SamplingParams, generation_config: GenerationConfig, vocab_size: int) -> list[int]:
    own = [] if params.ignore_eos else [token for token in generation_config.end_ids if 0 <= token < vocab_size]
    return list(dict.fromkeys(own + params.stop_token_ids))


def _sampling(
    params: SamplingParams,
    generation_config: GenerationConfig,
    seed: int,
    end_ids: list[int],
    bad_words: Sequence[list[int]],
    vocab_size: int,
) -> Sampling:
    return Sampling(
        temperature=_or(params.temperature, generation_config.temperature),
        top_k=min(max(0, int(_or(params.top_k, generation_config.top_k))), vocab_size),
        top_p=_or(params.top_p, generation_config.top_p),
        min_p=_or(params.min_p, generation_config.min_p),
        repetition_penalty=_or(params.repetition_penalty, generation_config.repetition_penalty),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=(seed if params.seed is None else params.seed) % SEEDS,
        min_tokens=params.min_tokens,
        end_ids=end_ids,
        logit_bias=sorted(params.logit_bias.items()),
        logprobs=-1 if params.logprobs is None else params.logprobs,
        prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
        allowed_token_ids=sorted(set(params.allowed_token_ids)),
        bad_words=[*bad_words],
        token_ids_logprob=params.token_ids_logprob,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
