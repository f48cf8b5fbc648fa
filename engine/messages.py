"""The protocol: every message that crosses a socket, and which process sends it to which.

    client         --Submit/Cancel/Command/Ping-->                       tokenizer_proc
    tokenizer_proc --Delta/Answer/Failure/Ping-->                        client
    tokenizer_proc --Generate/Abort/LoadAdapter/UnloadAdapter/PinAdapter--> scheduler
    scheduler      --Capacity/Progress/AdapterState/Stats-->             tokenizer_proc
    scheduler      --Reset/Step/LoadAdapter/UnloadAdapter/EvictAdapter--> model_runner, every rank
    model_runner   --RunnerReady/StepDone/AdapterState-->                scheduler, from rank 0
    a new incarnation of a process --Hello-->                            its neighbours

A client is a program that embeds `engine.Engine`. The tokenizer process is itself the HTTP server: for an HTTP request,
the first of these messages is `Generate`.

The messages are frozen msgspec structs, encoded as arrays with the class name as the tag. An inbox decodes one union
(at the end of this file) and refuses any other frame. Units: positions and lengths are in tokens, times in seconds,
sizes in bytes. KV page, row, lane and rank page numbers are assigned by the scheduler; the runner does not choose any.
Lane 0 is the base model. KV page 0 is never granted: padding writes there. `epoch` is the incarnation of the process
whose state a message describes; the receiver drops messages of an older epoch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

MAX_PROMPT = 1_200_000  # token ids or messages of a prompt
MAX_MIX = 64  # adapters of a mix
Few = msgspec.Meta(max_length=1 << 16)
"""The bound on lists and objects of a client that are not prompts: checked before their items are decoded."""


class Part(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Base class of structs that are sent only inside a message."""


class Message(Part, tag=True, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Base class of messages, which are encoded with their class name as the tag."""


# --------------------------------------------------------------------------------------- client -> tokenizer_proc


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters as a client gives them. None selects the model's default (generation_config.json); where the
    model has no default either, the parameter has no effect. With `max_tokens` 0 the prompt is only scored.

    `logprobs` and `prompt_logprobs` are the numbers of alternatives to report beside the chosen token (0: only the
    chosen one). The values are the model's raw log-softmax, before temperature, penalties and filters. Those of
    `token_ids_logprob` are reported too. The output has only tokens of `allowed_token_ids`, if there are any, and none
    of `bad_words`, unless they would leave no token.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[int, float], Few] = {}
    seed: int | None = None
    stop: Annotated[list[str], Few] = []
    stop_token_ids: Annotated[list[int], Few] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: Annotated[list[int], Few] = []
    bad_words: Annotated[list[str], Few] = []
    token_ids_logprob: Annotated[list[int], Few] = []
    stop_regex: Annotated[list[str], Few] = []


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a chat. `content` is text: content parts are joined before this struct is built.

    `tool_calls` are an assistant's calls in OpenAI's shape, but with `arguments` as an object, as templates expect
    them; `tool_call_id` is the call that a tool's message answers.
    """

    role: str
    content: str
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


AdapterMix = Annotated[dict[str, float], msgspec.Meta(max_length=MAX_MIX)]  # adapter name -> scale


class Submit(Message, frozen=True, kw_only=True):
    """client -> tokenizer_proc: generate from a prompt. Answered by Deltas or one Failure with the same `id`.

    `id` is chosen by the client and unique on its connection. `prompt` is text, token ids or a chat. `lora` is an
    adapter's name, a weighted mix, or None for the base model. Where `params.max_tokens` is None, `default_max_tokens`
    applies; where that is None too, generation may fill the context. Lower `priority` is admitted first.

    `truncate_prompt_tokens` keeps so many of the prompt's last tokens, with -1 as many as leave room for the output.
    Requests with different `cache_salt` share no prefix pages.
    """

    id: int
    prompt: str | Annotated[list[int | ChatMessage], msgspec.Meta(max_length=MAX_PROMPT)]
    params: SamplingParams = SamplingParams()
    lora: str | AdapterMix | None = None
    default_max_tokens: int | None = None
    chat_template_kwargs: Annotated[dict[str, str | int | float | bool | None], Few] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = True
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    truncate_prompt_tokens: int | None = None


class Cancel(Message, frozen=True):
    """client -> tokenizer_proc: abort Submit `id`. Its stream ends with finish reason abort."""

    id: int


class Command(Message, frozen=True, kw_only=True):
    """client -> tokenizer_proc: an adapter or information call. Answered by Answer or Failure with the same `id`.

    `load` is answered when the adapter is in host memory, with `preload` when it is resident on the device; with
    `load_inplace` a name that is in use is pointed at the new files. `unload` is answered when the adapter's device and
    host memory is free, or after a minute. `list` with a `lora_name` returns that adapter only.
    """

    id: int
    call: Literal["load", "unload", "pin", "unpin", "list", "info"]
    lora_name: str = ""
    lora_path: str = ""
    pinned: bool = False
    preload: bool = False
    load_inplace: bool = False


class Ping(Message, frozen=True):
    """client -> tokenizer_proc, each second, and back: the sender is alive. `epoch` is the tokenizer's incarnation."""

    epoch: int = 0


# --------------------------------------------------------------------------------------- tokenizer_proc -> client


class TokenLogprob(Part, frozen=True):
    """A token and the natural logarithm of its probability. `token` is the token's text, `bytes` its exact bytes."""

    token_id: int
    logprob: float
    token: str
    bytes: list[int]


class PositionLogprobs(Part, frozen=True):
    """Log-probabilities of one position: the chosen token, and the most likely tokens, most likely first.

    `asked` are those of `token_ids_logprob`, in its order.
    """

    chosen: TokenLogprob
    top: list[TokenLogprob]
    asked: list[TokenLogprob] = []


class Usage(Part, frozen=True):
    """Token counts of one choice. `cached_tokens` are prompt tokens whose KV came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


FinishReason = Literal["stop", "length", "abort"]


class Delta(Message, frozen=True, kw_only=True):
    """tokenizer_proc -> client: new text and tokens of choice `index` of Submit `id`.

    The last Delta of a choice has `finish_reason` and `usage`; `stop_reason` is the stop string or token id that ended
    the choice. `prompt_logprobs` come with choice 0 only, split over its Deltas and complete when its first token
    arrives; an aborted choice may lack the rest. They are None for the first position, which no token precedes.
    `prompt_token_ids` come with the first Delta of choice 0.
    """

    id: int
    index: int = 0
    text: str = ""
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    prompt_token_ids: list[int] | None = None


class AdapterCard(Part, frozen=True, kw_only=True):
    """One adapter as clients see it, in Answers and at /v1/models.

    `path` is the path that the caller gave, `root` the resolved directory, `parent` the base model's name, `created`
    the load time in Unix seconds, `bytes` the size in host memory, `running` the number of the adapter's open requests.
    `vocab_size` is the size of the adapter's own vocabulary, 0 where it uses the base's. `brings` lists the text files
    that replace the base's: tokenizer, chat_template, generation. `invocation` are the tokens that activate an
    activated LoRA (aLoRA). `notes` are on what the adapter's config names and the model has not.
    """

    name: str
    adapter_id: int
    path: str
    root: str
    parent: str
    revision: str = ""
    state: str = "loading"
    pinned: bool = False
    lora_rank: int = 0
    target_modules: list[str] = []
    bytes: int = 0
    running: int = 0
    created: int = 0
    vocab_size: int = 0
    brings: list[str] = []
    invocation: list[int] = []
    notes: list[str] = []


class Answer(Message, frozen=True, kw_only=True):
    """tokenizer_proc -> client: Command `id` succeeded. `adapters` and `info` are its results."""

    id: int
    adapters: list[AdapterCard] = []
    info: dict[str, msgspec.Raw] = {}


class Failure(Message, frozen=True):
    """tokenizer_proc -> client: Submit or Command `id` was refused or failed.

    The fields are those of an EngineError; engine.errors.error_from_wire builds the exception from them.
    """

    id: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None


# ------------------------------------------------------------------------------------- tokenizer_proc <-> scheduler


class Sampling(Part, frozen=True, kw_only=True):
    """Sampling parameters for the runner's sampler: every default is resolved, and `seed` is always set.

    `temperature` 0 is greedy, `top_k` 0 is off. `end_ids` are masked until `min_tokens` tokens were generated.
    `logprobs` and `prompt_logprobs`: -1 is off; k >= 0 reports the sampled or prompt token, the k most likely ones, and
    `token_ids_logprob`. Where `allowed_token_ids` is empty, every token is allowed. `bad_words` are token ids.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    end_ids: list[int] = []
    logit_bias: list[tuple[int, float]] = []
    logprobs: int = -1
    prompt_logprobs: int = -1
    allowed_token_ids: list[int] = []
    bad_words: list[list[int]] = []
    token_ids_logprob: list[int] = []


class Stopping(Part, frozen=True):
    """Stop conditions that the scheduler checks: `max_tokens` (>= 1), or any of `end_ids` after `min_tokens` tokens.

    Stop strings are found by the tokenizer process, which then sends Abort.
    """

    max_tokens: int
    min_tokens: int = 0
    end_ids: list[int] = []


class Generate(Message, frozen=True, kw_only=True):
    """tokenizer_proc -> scheduler: run a request. Answered by Updates in Progress.

    `prompt` are token ids. `generated` are tokens the request already has: not empty when the tokenizer process sends
    its open requests again to a new scheduler. `lora` is [(adapter_id, scale)]: empty for the base, one pair for an
    adapter, several for a weighted mix. Requests with different `cache_salt` share no prefix pages. Lower `priority` is
    admitted first. Fair shares are of `tenant`, and of the adapters where it is empty.
    """

    epoch: int
    request_id: int
    prompt: list[int]
    generated: list[int] = []
    lora: list[tuple[int, float]] = []
    sampling: Sampling
    stopping: Stopping
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""


class Abort(Message, frozen=True):
    """tokenizer_proc -> scheduler: end this request. Answered by an Update with finish abort if it was still open."""

    epoch: int
    request_id: int


class LoadAdapter(Message, frozen=True, kw_only=True):
    """tokenizer_proc -> scheduler -> every rank: load the directory `path` into host memory as `adapter_id` (> 0).

    Answered by AdapterState. A second LoadAdapter with the same id has no effect, also after a failed load: a retry
    takes a new id. `revision`, when not empty, must equal the hash of the files. With `roots` the real path of each
    file must lie under one of them. `name` appears in error texts only. `preload` asks the scheduler to make the
    adapter resident on the device as soon as there is room.
    """

    adapter_id: int
    path: str
    revision: str = ""
    pinned: bool = False
    preload: bool = False
    name: str = ""
    roots: list[str] = []


class EvictAdapter(Message, frozen=True):
    """scheduler -> every rank: drop the adapter's copy in host memory. Answered by AdapterState disk.

    The adapter is loaded from disk again when it is next needed. The message is never sent while the adapter is loading
    or being filled; the rank pages that the adapter holds on the device stay as they are.
    """

    adapter_id: int


class UnloadAdapter(Message, frozen=True):
    """tokenizer_proc -> scheduler -> every rank: free the adapter once its last request has ended.

    Answered by AdapterState gone.
    """

    adapter_id: int


class PinAdapter(Message, frozen=True):
    """tokenizer_proc -> scheduler: pin or unpin an adapter; a pinned one is not evicted from device or host memory."""

    adapter_id: int
    pinned: bool


class LogprobIds(Part, frozen=True):
    """Log-probabilities of one position by token id: the chosen token, then the most likely ones, most likely first.

    `asked` are those of the request's `token_ids_logprob`, in its order.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    asked: list[float] = []


class Update(Part, frozen=True, kw_only=True):
    """New tokens of one request, its end, or both.

    `index` is the position of `tokens[0]` among the generated tokens, from 0. The receiver drops tokens it already has
    and treats a gap as a fault. `error` ends the request as failed; with a `code` the cause is not its adapters.
    `prompt_logprobs` arrive in pieces, all before the first token; `prompt_index` is the number of positions in the
    earlier pieces. `queued` comes with the first token: the seconds from the request's arrival to its first row.
    """

    request_id: int
    index: int
    tokens: list[int] = []
    finish: FinishReason | None = None
    stop_reason: int | None = None
    cached_tokens: int = 0
    error: str | None = None
    logprobs: list[LogprobIds] | None = None
    prompt_logprobs: list[LogprobIds] | None = None
    code: str | None = None
    prompt_index: int = 0
    queued: float = 0.0


class Progress(Message, frozen=True):
    """scheduler -> tokenizer_proc: the Updates of one step, for all requests of the batch; a large list is split.

    `epoch` is the tokenizer process's incarnation, `scheduler` the sender's: Progress of a scheduler that has been
    replaced is dropped.
    """

    epoch: int
    updates: list[Update]
    scheduler: int = 0


class Footprint(Part, frozen=True):
    """The rank pages that an adapter occupies while it is resident, by group (qkv, o, gate_up, down, ...)."""

    pages: dict[str, int]


AdapterStage = Literal["loading", "disk", "host", "resident", "draining", "gone", "failed"]


class AdapterState(Message, frozen=True, kw_only=True):
    """rank 0 -> scheduler -> tokenizer_proc: the state of an adapter, and the properties found by loading it.

    States: loading (from disk), disk (no copy in memory), host (in host memory), resident (in rank pages on the
    device), draining (unloaded, requests still open), gone (unloaded, memory free), failed (cannot be served). With
    disk or host, `error` is why the last load or fill did not succeed; the next request tries again.

    `bytes` is the size of the copy in host memory. `seconds` is the time taken to reach this state: the load from disk
    for host, the fill for resident. `epoch` is the runner's. `vocab_size` is the size of the adapter's own vocabulary,
    0 where it uses the base's. `invocation` are the tokens that activate the adapter: it applies from their last
    occurrence in the prompt on; where `invocation` is empty, it applies from the first token on. `server_fault`: the
    error is one of this server's disk or memory, not one of the adapter. `notes` are on what the adapter's config names
    and the model has not.
    """

    adapter_id: int
    state: AdapterStage
    revision: str = ""
    footprint: Footprint = Footprint({})
    bytes: int = 0
    lora_rank: int = 0
    target_modules: list[str] = []
    error: str | None = None
    seconds: float = 0.0
    epoch: int = 0
    vocab_size: int = 0
    invocation: list[int] = []
    server_fault: bool = False
    notes: list[str] = []


class Capacity(Message, frozen=True, kw_only=True):
    """rank 0 -> scheduler (inside RunnerReady) -> tokenizer_proc: what the runner measured and allocated at start.

    There are `kv_pages` grantable KV pages of `page_size` tokens, numbered 1..kv_pages, and `rows` rows, numbered
    0..rows-1. `rank_pages` are the numbers of rank pages by group; in each group they are numbered from 0. Lanes are
    numbered 1..max_loras; each holds up to `max_lane_pages` rank pages of a group. `max_length` is the longest context
    and `max_batched_tokens` the largest step, in tokens. `host_bytes` is the host memory for adapters. `*_backend`,
    `device` and `dtype` are the resolved choices.
    """

    kv_pages: int
    page_size: int
    rows: int
    max_length: int
    max_batched_tokens: int
    vocab_size: int
    max_loras: int = 0
    rank_pages: dict[str, int] = {}
    max_lora_rank: int = 0
    max_lane_pages: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    attention_backend: str = "torch"
    lora_backend: str = "torch"
    lora_targets: list[str] = []
    weight_bytes: int = 0
    kv_bytes: int = 0
    lora_bytes: int = 0
    rank_page_bytes: dict[str, int] = {}
    host_bytes: int = 0


WaitReason = Literal["load", "fill", "rank_pages", "lanes", "rows", "pages", "turn", "trial"]


class WaitingRequest(Part, frozen=True):
    """A waiting request: `seconds` since it last entered the queue, what it waits for, and its number of `generated`
    tokens.
    """

    request_id: int
    seconds: float
    reason: WaitReason
    generated: int = 0


class Stats(Message, frozen=True, kw_only=True):
    """scheduler -> tokenizer_proc: gauges and counters, each second while something changes or requests are open.

    Gauges: requests, pages in use and free, adapters by id. Counters since the scheduler's start: steps, tokens,
    preemptions, and hits, fills, evictions and loads of adapters. `step_seconds` are the steps since the last Stats.
    `oldest_waiting` are the waiting requests that arrived first, in order of arrival, up to a bound.
    """

    running: int = 0
    waiting: int = 0
    kv_pages_used: int = 0
    kv_pages: int = 0
    rank_pages_used: dict[str, int] = {}
    resident: list[int] = []
    running_adapters: dict[int, int] = {}
    waiting_adapters: dict[int, int] = {}
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    adapter_hits: int = 0
    adapter_fills: int = 0
    adapter_evictions: int = 0
    adapter_loads: int = 0
    host_adapters: int = 0
    host_bytes: int = 0
    host_evictions: int = 0
    audits: int = 0
    step_seconds: list[float] = []
    waiting_reasons: dict[WaitReason, int] = {}
    lane_preemptions: int = 0
    cached_tokens: int = 0
    kv_pages_cached: int = 0
    kv_evictions: int = 0
    oldest_waiting: list[WaitingRequest] = []


# ------------------------------------------------------------------------------------------------ scheduler <-> ranks


class Fill(Part, frozen=True):
    """Copy an adapter from host memory into these rank pages, by group. Answered by AdapterState resident.

    With `at_once` the whole copy happens before the forward of this step, whose lanes may already use the pages;
    earlier steps may still be reading them. Without `at_once` the copy runs beside the steps, in slices, and no lane
    uses the pages before AdapterState resident has arrived.
    """

    adapter_id: int
    pages: dict[str, list[int]]
    at_once: bool = False


class LanePages(Part, frozen=True):
    """The content of lane `lane` (>= 1) from this step on: (rank page, scale) pairs by group. A missing group has no
    delta.
    """

    lane: int
    pages: dict[str, list[tuple[int, float]]]


class NewRow(Part, frozen=True, kw_only=True):
    """Assign row `row` to a new request; the row's former state is reset. `generation` counts such assignments.

    `history` are all tokens so far (prompt and generated) if the sampler needs them, else empty; those from position
    `prompt_length` on are generated. Each draw is seeded by `sampling.seed` and the token's position.
    """

    row: int
    generation: int
    prompt_length: int
    sampling: Sampling
    history: list[int] = []


class Chunk(Part, frozen=True, kw_only=True):
    """One row's part of a step: `length` positions from `start` on, computed with the adapter in lane `lane`.

    `tokens` are the input tokens of those positions; empty for a decode (length 1), whose input is the row's last
    sampled token, still on the device. `pages` are KV pages appended to the row's page table before the step.
    `samples`: a token is sampled at the last position. `scores`: every position yields the log-probability of the token
    after it; with `scores`, `tokens` also holds the token after the last position, unless the chunk samples it.

        position    start ............ start+length-1 | start+length
        tokens      t0 t1 ...          t(length-1)    | (target, only for `scores` without `samples`)
    """

    row: int
    generation: int
    start: int
    length: int
    lane: int = 0
    tokens: list[int] = []
    pages: list[int] = []
    samples: bool = True
    scores: bool = False


class Step(Message, frozen=True, kw_only=True):
    """scheduler -> every rank: apply fills, lanes and new rows, in this order, then run one forward over the chunks.

    Answered by StepDone. Several steps may be in flight; ranks run them in order of `id`.
    """

    epoch: int
    id: int
    fills: list[Fill] = []
    lanes: list[LanePages] = []
    new_rows: list[NewRow] = []
    chunks: list[Chunk] = []


class StepDone(Message, frozen=True, kw_only=True):
    """rank 0 -> scheduler: the results of step `id`, which took `seconds`.

    `tokens` has one entry for each chunk that samples, in chunk order. `logprobs` and `prompt_logprobs` are keyed by
    the chunk's index in the step.
    """

    epoch: int
    id: int
    tokens: list[int] = []
    logprobs: dict[int, LogprobIds] = {}
    prompt_logprobs: dict[int, list[LogprobIds]] = {}
    seconds: float = 0.0


class RunnerReady(Message, frozen=True, kw_only=True):
    """rank 0 -> scheduler: the model is loaded and `capacity` allocated.

    `after_fault`: the former runner ended by itself, so the steps that it was running may be the cause.
    """

    epoch: int
    capacity: Capacity
    after_fault: bool = False


class Reset(Message, frozen=True):
    """scheduler -> every rank: a new scheduler incarnation started. Clear rows and lanes. Answered by RunnerReady."""

    epoch: int


class Hello(Message, frozen=True):
    """A new incarnation of a process -> its neighbours: the process's name, and the address of its inbox."""

    process: Literal["tokenizer", "scheduler", "runner"]
    epoch: int
    inbox: str
    rank: int = 0


# -------------------------------------------------------------------------------------------------------- the inboxes

ToTokenizer = Hello | Capacity | Progress | AdapterState | Stats
ToScheduler = (
    Hello | Generate | Abort | LoadAdapter | UnloadAdapter | PinAdapter | RunnerReady | StepDone | AdapterState
)
ToRunner = Hello | Reset | Step | LoadAdapter | UnloadAdapter | EvictAdapter
ToZmqServer = Submit | Cancel | Command | Ping
ToClient = Delta | Answer | Failure | Ping
