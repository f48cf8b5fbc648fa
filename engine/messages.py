"""The protocol: every message that crosses a socket, and who sends it to whom.

    host --Submit/Cancel/Command/Ping--> tokenizer_proc --Delta/Answer/Failure--> host
    tokenizer_proc --Generate/Abort/LoadAdapter/UnloadAdapter/PinAdapter--> scheduler
    scheduler --Capacity/Progress/AdapterState/Stats--> tokenizer_proc
    scheduler --Reset/Step/LoadAdapter/UnloadAdapter/EvictAdapter--> every rank
    rank 0 --RunnerReady/StepDone/AdapterState--> scheduler
    every new incarnation --Hello--> its neighbours

Structs are frozen and array-like; a tag says which message it is, so an inbox is typed by its union and a stranger is
refused. `epoch` is the incarnation of the process whose state a message belongs to: a message of an older epoch is
dropped. Units: positions and lengths in tokens, times in seconds, sizes in bytes. Page, row and lane numbers are the
scheduler's; the runner obeys. Lane 0 is the base model; KV page 0 is never granted (padding writes there).
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Part(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """A piece of a message."""


class Message(Part, tag=True, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Something sent on its own."""


# ---------------------------------------------------------------------------------------------- what a client asks


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to generate, as a client says it. None means: the model's default (generation_config.json), else neutral.

    `logprobs` and `prompt_logprobs` are how many alternatives to report beside the chosen token (0 = only the chosen
    one); values are the raw log-softmax of the model, before temperature, penalties and filters.
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
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation; content is text (parts are joined before this point)."""

    role: str
    content: str
    name: str | None = None


AdapterMix = dict[str, float]  # adapter name -> scale


class Submit(Message, frozen=True, kw_only=True):
    """host -> tokenizer_proc: generate. `id` is the host's own number; `prompt` is text, token ids or a chat.

    `lora` is an adapter's name, a weighted mix, or None for the base. `max_tokens` None means `default_max_tokens`,
    and where that is None too, to the end of the context.
    """

    id: int
    prompt: str | list[int | ChatMessage]
    params: SamplingParams = SamplingParams()
    lora: str | AdapterMix | None = None
    default_max_tokens: int | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = True
    priority: int = 0
    tenant: str = ""


class Cancel(Message, frozen=True):
    """host -> tokenizer_proc: forget Submit `id`. Its stream ends with finish reason abort."""

    id: int


class Command(Message, frozen=True, kw_only=True):
    """host -> tokenizer_proc: an adapter or information call; answered by Answer or Failure with the same id.

    `load` answers when the adapter is on the host, with `preload` when it is resident; with `load_inplace` a name that
    is taken is pointed at the new files. `unload` answers when device and host memory are free, or after a minute.
    `list` with a `lora_name` tells of that one alone.
    """

    id: int
    call: Literal["load", "unload", "pin", "unpin", "list", "info"]
    lora_name: str = ""
    lora_path: str = ""
    pinned: bool = False
    preload: bool = False
    load_inplace: bool = False


class Ping(Message, frozen=True):
    """host -> tokenizer_proc -> host: I am alive. `epoch` is the tokenizer process's."""

    epoch: int = 0


# --------------------------------------------------------------------------------------------- what a client is told


class TokenLogprob(Part, frozen=True):
    """A token with the natural logarithm of its probability. `token` is its text, `bytes` its exact bytes."""

    token_id: int
    logprob: float
    token: str
    bytes: list[int]


class PositionLogprobs(Part, frozen=True):
    """The chosen token of one position, and the best alternatives, best first. None where nothing precedes it."""

    chosen: TokenLogprob
    top: list[TokenLogprob]


class Usage(Part, frozen=True):
    """Token counts of one choice; cached tokens are prompt tokens that were not recomputed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


FinishReason = Literal["stop", "length", "abort"]


class Delta(Message, frozen=True, kw_only=True):
    """tokenizer_proc -> host: more of choice `index` of Submit `id`. The last one of a choice has `finish_reason`.

    `stop_reason` is the stop string or token id that ended it. `prompt_logprobs` come with choice 0, in pieces, the
    last of them with its first token at the latest; the first position's is None. An aborted choice may lack
    the rest of them. `prompt_token_ids` come with the first delta of choice 0.
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
    """What is known of one adapter.

    `vocab_size` are the tokens of a vocabulary of its own, 0: the base's. `brings` says how it reads and writes text in
    its own way: tokenizer, chat_template, generation. `invocation` are the tokens from which on it acts, if any.
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


class Answer(Message, frozen=True, kw_only=True):
    """tokenizer_proc -> host: Command `id` was done."""

    id: int
    adapters: list[AdapterCard] = []
    info: dict[str, msgspec.Raw] = {}


class Failure(Message, frozen=True):
    """tokenizer_proc -> host: Submit or Command `id` was refused or failed; see engine.errors.error_from_wire."""

    id: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None


# ------------------------------------------------------------------------------------- tokenizer_proc <-> scheduler


class Sampling(Part, frozen=True, kw_only=True):
    """What the runner's sampler must know of a request. All values are resolved; `seed` is always given.

    `end_ids` are masked until `min_tokens` tokens were generated. `logprobs` -1 is off, k >= 0 reports the sampled
    token and the k best; `prompt_logprobs` likewise. top_k 0 is off; temperature 0 is greedy.
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


class Stopping(Part, frozen=True):
    """What the scheduler must know: at most `max_tokens` (>= 1), ended by any of `end_ids` after `min_tokens`."""

    max_tokens: int
    min_tokens: int = 0
    end_ids: list[int] = []


class Generate(Message, frozen=True, kw_only=True):
    """tokenizer_proc -> scheduler: run this. `generated` are tokens it already has (replay after a crash).

    `lora` is [(adapter_id, scale)]: empty = base, one = the usual case, several = a weighted mix.
    `cache_salt` keeps the prefix pages of tenants apart. Lower `priority` runs first.
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


class Abort(Message, frozen=True):
    """tokenizer_proc -> scheduler: stop this request. Answered by an Update with finish abort if it was still there."""

    epoch: int
    request_id: int


class LoadAdapter(Message, frozen=True, kw_only=True):
    """tokenizer_proc -> scheduler -> ranks: bring this directory to the host tier as `adapter_id` (> 0).

    Doing it twice is harmless, and does not revive one that failed: to try its files again takes a new id. `revision`,
    when not empty, must be what the files hash to. `name` is for messages. `preload` asks the scheduler to make it
    resident as soon as there is room. Answered by AdapterState.
    """

    adapter_id: int
    path: str
    revision: str = ""
    pinned: bool = False
    preload: bool = False
    name: str = ""


class EvictAdapter(Message, frozen=True):
    """scheduler -> ranks: forget the host copy; it is read again when it is asked for. Answered by AdapterState disk.

    Never sent while the adapter is loading or being filled; rank pages it holds stay as they are.
    """

    adapter_id: int


class UnloadAdapter(Message, frozen=True):
    """tokenizer_proc -> scheduler -> ranks: no new requests; free it when the last one is done (state gone)."""

    adapter_id: int


class PinAdapter(Message, frozen=True):
    """tokenizer_proc -> scheduler: never evict it (or: evict it again like any other)."""

    adapter_id: int
    pinned: bool


class LogprobIds(Part, frozen=True):
    """Log-probabilities of one position by token id: the chosen token, then the best, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Update(Part, frozen=True, kw_only=True):
    """News of one request. `index` counts generated tokens: it is the number of the first token in `tokens`.

    Tokens below the receiver's count are duplicates and dropped; a gap is a fault. `error` ends the request as failed;
    with a `code` the reason is not its adapters. `prompt_logprobs` come in pieces, all before the first token;
    `prompt_index` counts the positions of earlier pieces, like `index`.
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


class Progress(Message, frozen=True):
    """scheduler -> tokenizer_proc: one step's news, a list for all requests of the batch, or a part of it if large.

    `epoch` is the tokenizer process's, `scheduler` the sender's own: a dead one's last words are dropped, for another
    has taken its requests over.
    """

    epoch: int
    updates: list[Update]
    scheduler: int = 0


class Footprint(Part, frozen=True):
    """What an adapter occupies when resident: rank pages by group."""

    pages: dict[str, int]


AdapterStage = Literal["loading", "disk", "host", "resident", "draining", "gone", "failed"]


class AdapterState(Message, frozen=True, kw_only=True):
    """rank 0 -> scheduler -> tokenizer_proc: where an adapter is, and what was learnt when it was loaded.

    `bytes` is what its host copy takes. `seconds` is how long what led to this state took: a load from disk (host), a
    fill (resident). `epoch` is the runner's: a late word of a dead runner is dropped. With state disk or host, `error`
    says what did not work (a load from disk, making it resident): the next request tries again. `vocab_size` are the
    tokens of a vocabulary of its own, 0: the base's. `invocation` are the tokens from whose last occurrence in a prompt
    on it acts; none: it acts from the first token on.
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


class Capacity(Message, frozen=True, kw_only=True):
    """runner -> scheduler (inside RunnerReady) -> tokenizer_proc: who measures, tells.

    `kv_pages` counts grantable pages, numbered 1..kv_pages; `rows` are numbered 0..rows-1; `rank_pages` counts the
    pages of each group, numbered from 0; lanes are numbered 1..max_loras.
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
    """A request that waits: for how many seconds since it last came to the queue, for what, with how many tokens."""

    request_id: int
    seconds: float
    reason: WaitReason
    generated: int = 0


class Stats(Message, frozen=True, kw_only=True):
    """scheduler -> tokenizer_proc, each second while anything changes or requests are open: a picture, and sums.

    `oldest_waiting` are those of the waiting requests that arrived first, in this order; all, if they are not many.
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
    """Copy an adapter from the host tier into these rank pages, by group. Answered by AdapterState resident.

    `now`: all of it before the forward of this very step, whose lanes may name the pages already, while earlier steps
    may still read them. Else beside the steps, in slices, and no lane names the pages before the answer.
    """

    adapter_id: int
    pages: dict[str, list[int]]
    now: bool = False


class LanePages(Part, frozen=True):
    """Lane `lane` (>= 1) from now on: per group, (rank page, scale) pairs. A group that is not named has no delta."""

    lane: int
    pages: dict[str, list[tuple[int, float]]]


class NewRow(Part, frozen=True, kw_only=True):
    """Row `row` begins generation `generation`: forget what it held.

    `history` is everything known so far (prompt and generated) when a penalty needs counts, else empty; positions
    from `prompt_length` on are generated ones. A sampled token's position seeds its draw.
    """

    row: int
    generation: int
    prompt_length: int
    sampling: Sampling
    history: list[int] = []


class Chunk(Part, frozen=True, kw_only=True):
    """One row's share of a step: `length` positions from `start` on, through lane `lane`.

    `tokens` are the inputs at those positions; empty means: the row's own last sample (a decode of length 1).
    `pages` are KV pages appended to the row's table before the step. `samples`: the last position yields a token.
    `scores`: every position yields the log-probability of the token after it; `tokens` then holds one more, the token
    after the last position, unless the chunk also samples.

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
    """scheduler -> every rank: do, in this order, fills, lanes, new rows, then one forward over the chunks."""

    epoch: int
    id: int
    fills: list[Fill] = []
    lanes: list[LanePages] = []
    new_rows: list[NewRow] = []
    chunks: list[Chunk] = []


class StepDone(Message, frozen=True, kw_only=True):
    """rank 0 -> scheduler: step `id` is done. `tokens` has one entry for each chunk that samples, in chunk order.

    `logprobs` and `prompt_logprobs` are keyed by the chunk's index in the step.
    """

    epoch: int
    id: int
    tokens: list[int] = []
    logprobs: dict[int, LogprobIds] = {}
    prompt_logprobs: dict[int, list[LogprobIds]] = {}
    seconds: float = 0.0


class RunnerReady(Message, frozen=True, kw_only=True):
    """rank 0 -> scheduler: the model is loaded; this is what it can hold.

    `after_fault`: the runner before ended by itself, so that what it was doing may be to blame.
    """

    epoch: int
    capacity: Capacity
    after_fault: bool = False


class Reset(Message, frozen=True):
    """scheduler -> every rank: a new scheduler incarnation; forget rows and lanes, then answer RunnerReady."""

    epoch: int


class Hello(Message, frozen=True):
    """A new incarnation to its neighbours: who it is and where its inbox is bound."""

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
