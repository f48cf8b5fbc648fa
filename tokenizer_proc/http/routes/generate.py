"""The route POST /generate in SGLang's dialect: text or token ids, one or more prompts, adapters by `lora_path`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence

import msgspec
from aiohttp import web
from msgspec.structs import replace

from engine.errors import InvalidRequest
from engine.messages import AdapterMix, SamplingParams, Submit
from tokenizer_proc.http import adapter_access
from tokenizer_proc.http.bodies import decoding
from tokenizer_proc.http.bodies.fields import SPELLINGS_NATIVE
from tokenizer_proc.http.bodies.prompts import PromptField, TokenIds, is_single, paced, prompts, spread
from tokenizer_proc.http.dialects.sglang import LogprobOptions, NativeWriter
from tokenizer_proc.http.generation import GenerationCall, answer
from tokenizer_proc.http.service import Service

DEFAULT_MAX_TOKENS = 128

LoraField = str | AdapterMix
LorasField = LoraField | list[LoraField | None] | None
ParamFields = dict[str, object]


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of the body. `sampling_params` is decoded separately, so that an error names its field by path."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: ParamFields | list[ParamFields] = {}
    lora_path: LorasField = None
    rid: str | list[str] | None = None
    stream: bool = False
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    top_logprobs_num: int | list[int] = 0
    token_ids_logprob: list[int | list[int]] = []
    return_text_in_logprobs: bool = False
    add_special_tokens: bool = True
    priority: int = 0
    cache_salt: str = ""


class _Params(msgspec.Struct, frozen=True):
    """The part of `sampling_params` that applies to one prompt. `at` is its path in the body, for errors."""

    sampling: SamplingParams
    lora: LoraField | None
    at: str


async def generate(service: Service, request: web.Request) -> web.StreamResponse:
    """Generates from `text` or `input_ids` in SGLang's dialect, one prompt or a list, streamed or not.

    `sampling_params` and `lora_path` are given once, or as a list with one for each prompt.
    """
    body = decoding.decode(await decoding.read(request), GenerateBody)
    field = _prompt_field(body)
    asked = prompts(field, _prompt_name(body), service.config.max_open_requests)
    size = len(asked)
    rids = _rids(body.rid, size)
    scoring = _scoring(body, size)
    read = [one async for one in paced(_params(body, size))]
    params = [_scored(one, score) for one, score in zip(read, scoring, strict=True)]
    await adapter_access.fetch(service, request, None, *_loras(body, params))
    named = zip(params, spread(body.lora_path, size, "lora_path"), strict=True)
    loras = [adapter_access.select(service, request, None, _agreed(lora, one)) async for one, lora in paced(named)]
    submits = _submits(body, asked, params, loras)
    is_list = not is_single(field) or any(one.sampling.n > 1 for one in params)
    writer = NativeWriter(rids, scoring, is_list, [service.frontend.text_tools_for(lora).tokenizer for lora in loras])
    call = GenerationCall(submits=submits, ids=_by_rid(body.rid, rids), stream=body.stream, names=_names(body))
    return await answer(service, request, call, writer)


def _names(body: GenerateBody) -> dict[str, str]:
    """Returns the client's names for fields, by the names that the front end's errors use."""
    several = [body.sampling_params] if isinstance(body.sampling_params, dict) else body.sampling_params
    words = {field: name for one in several for field, name in decoding.spelt(one, SPELLINGS_NATIVE).items()}
    return {field: f"sampling_params.{name}" for field, name in words.items()} | {
        "prompt": _prompt_name(body),
        "logprobs": "top_logprobs_num",
        "prompt_logprobs": "top_logprobs_num",
    }


def _prompt_name(body: GenerateBody) -> str:
    return "input_ids" if body.text is None or body.input_ids else "text"


def _prompt_field(body: GenerateBody) -> PromptField:
    if body.text and body.input_ids:
        raise InvalidRequest("text and input_ids exclude each other", param="input_ids")
    if body.text is not None and not body.input_ids:
        return body.text if isinstance(body.text, str) else [*body.text]
    if body.input_ids is None:
        raise InvalidRequest("send text or input_ids", param="text")
    return [*body.input_ids]


def _rids(rid: str | list[str] | None, size: int) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(size)]
    if isinstance(rid, str):
        return [rid] if size == 1 else [f"{rid}_{item}" for item in range(size)]
    return spread(rid, size, "rid")


def _by_rid(given: str | list[str] | None, rids: Sequence[str]) -> dict[str, list[int]]:
    """Returns the items (prompts) that each id refers to. One id that was given for several prompts refers to all."""
    meant: dict[str, list[int]] = {given: [*range(len(rids))]} if isinstance(given, str) else {}
    for item, rid in enumerate(rids):
        if rid != given:
            meant.setdefault(rid, []).append(item)
    return meant


def _params(body: GenerateBody, size: int) -> Iterator[_Params]:
    """Yields what applies to each of `size` prompts."""
    asked = body.sampling_params
    if isinstance(asked, dict):
        sampling, loras = _read(asked, "sampling_params.")
        spread_out = spread(loras, size, "sampling_params.lora_path")
        yield from (_Params(sampling, lora, "sampling_params.") for lora in spread_out)
        return
    if len(asked) != size:
        raise InvalidRequest(f"sampling_params has {len(asked)} entries for {size} prompts", param="sampling_params")
    for item, one in enumerate(asked):
        at = f"sampling_params[{item}]."
        sampling, lora = _read(one, at)
        yield _Params(sampling, spread(lora, 1, f"{at}lora_path")[0], at)


class _Lora(msgspec.Struct, frozen=True):
    """The only field in `sampling_params` that is not a sampling parameter."""

    lora_path: LorasField = None


def _read(asked: Mapping[str, object], at: str) -> tuple[SamplingParams, LorasField]:
    """Decodes one dict of `sampling_params`. Returns its sampling parameters and its `lora_path`, if it has one."""
    present = decoding.present(asked)
    lora = {name: present.pop(name) for name in ("lora_path",) if name in present}
    return decoding.params(present, SPELLINGS_NATIVE, at), decoding.decode(lora, _Lora, at).lora_path


def _scoring(body: GenerateBody, size: int) -> list[LogprobOptions | None]:
    wanted = spread(body.return_logprob, size, "return_logprob")
    starts = spread(body.logprob_start_len, size, "logprob_start_len")
    tops = spread(body.top_logprobs_num, size, "top_logprobs_num")
    for start in starts:
        if start < -1:
            raise InvalidRequest(
                f"logprob_start_len = {start}: -1 (none of the prompt) or more", param="logprob_start_len"
            )
    with_text, asked = body.return_text_in_logprobs, _asked_ids(body, size)
    if body.token_ids_logprob and not all(wanted):
        raise InvalidRequest("token_ids_logprob needs return_logprob = true", param="token_ids_logprob")
    return [
        LogprobOptions(start, top, with_text, ids) if want else None
        for want, start, top, ids in zip(wanted, starts, tops, asked, strict=True)
    ]


def _asked_ids(body: GenerateBody, size: int) -> list[list[int]]:
    """Returns `token_ids_logprob` for each prompt; it is one list of ids for all, or one for each."""
    given = body.token_ids_logprob
    lists = [one for one in given if isinstance(one, list)]
    if not lists:
        return [[one for one in given if isinstance(one, int)]] * size
    if len(lists) != len(given):
        raise InvalidRequest("token_ids_logprob mixes ids and lists: send one kind", param="token_ids_logprob")
    return spread(lists, size, "token_ids_logprob")


def _scored(one: _Params, scoring: LogprobOptions | None) -> _Params:
    if scoring is None:
        return one
    prompt = scoring.top if scoring.start >= 0 else None
    sampling = replace(one.sampling, logprobs=scoring.top, prompt_logprobs=prompt, token_ids_logprob=scoring.asked)
    return replace(one, sampling=sampling)


def _submits(
    body: GenerateBody,
    asked: Sequence[str | TokenIds],
    params: Sequence[_Params],
    loras: Sequence[LoraField | None],
) -> list[Submit]:
    return [
        Submit(
            id=item,
            prompt=prompt if isinstance(prompt, str) else [*prompt],
            params=one.sampling,
            lora=lora,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            add_special_tokens=body.add_special_tokens,
            priority=body.priority,
            cache_salt=body.cache_salt,
        )
        for item, (prompt, one, lora) in enumerate(zip(asked, params, loras, strict=True))
    ]


def _loras(body: GenerateBody, params: Sequence[_Params]) -> list[LoraField | None]:
    """Returns every adapter name or mix that the body contains."""
    own = body.lora_path if isinstance(body.lora_path, list) else [body.lora_path]
    return [*own, *(one.lora for one in params)]


def _agreed(lora: LoraField | None, params: _Params) -> LoraField | None:
    if lora is not None and params.lora is not None and lora != params.lora:
        raise InvalidRequest(
            f"lora_path = {lora!r} and {params.at}lora_path = {params.lora!r} disagree", param="lora_path"
        )
    return params.lora if lora is None else lora
