"""Whether planning a step while another still runs pays at this load: found out by doing both. Knows no clock.

What an early plan hides, the host's part of a step, takes cores from the runner where there are few: then the step
becomes longer by more than was hidden. Neither the model nor the machine tells beforehand, so blocks of steps are
waited for and overlapped in turn, and the sum of what pairs of them say is the evidence:

    +1  --------------x ........................x.x   it overlaps, and makes one more pair after a long rest
                   x                             x
     0  .......x.x....... pairs, one after another
         x.x.x
    -1  -------------------------------------------   it waits, likewise

Where the runner computes all the time while it is waited for, there is nothing to hide and no pair is begun.

A pair says which of its blocks took less time for a row. Each step's time is seen against what is typical of steps
with about so many tokens of prompts in them: a block in which more requests arrived is not a slower one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log, log2

LEAST_GAIN = 0.05  # less is not worth it: who arrives waits up to one step more for an early plan
FIRST = -0.5  # the evidence at first: waiting costs nothing that a window of one would not
MOST_GAIN = 0.25  # that one pair may show: more is an accident
SETTLING, COUNTED = 3, 12  # steps of a block: the first ones still show the block before
FIRST_REST, REST = 250, 2000  # steps between pairs when it is clear: at first, when much warms up, and at last
OUTLIER = 3.0  # times what is typical: more counts as that
LOOK_BACK = 64  # steps that make it typical
SMOOTH = 8  # steps that make a load
CLEAR_OF = 0.75  # of a doubling: so far the load moves before it is another one


@dataclass
class _Typical:
    """The usual seconds of a row in a kind of step."""

    seconds: float = 0.0
    steps: int = 0

    def learn(self, seconds: float) -> float:
        """Takes one in; returns it, or what counts for it."""
        kept = min(seconds, OUTLIER * self.seconds) if self.steps else seconds
        self.steps = min(self.steps + 1, LOOK_BACK)
        self.seconds += (kept - self.seconds) / self.steps
        return kept


@dataclass
class _Load:
    """What is known at about so many rows. `evidence` is from -1 to 1, `rest` steps until the next pair of blocks."""

    evidence: float = FIRST
    rest: int = 0
    next_rest: int = FIRST_REST
    typical: dict[int, _Typical] = field(default_factory=dict)  # by the logarithm of the tokens of prompts


@dataclass
class _Block:
    """Steps in a row that were all waited for, or all planned early where they could be. All in seconds."""

    early: bool
    steps: int = 0
    typical: float = 0.0
    kept: float = 0.0
    whole: float = 0.0
    computed: float = 0.0

    @property
    def speed(self) -> float:
        """Of what is typical."""
        return self.typical / self.kept

    @property
    def hideable(self) -> float:
        """The share of the time in which the runner computed nothing: where it was waited for, all there is to win."""
        return 1 - self.computed / self.whole


@dataclass
class OverlapTuner:
    """Is told of every step that ended while there was work, and says whether the next is to be planned early."""

    _loads: dict[int, _Load] = field(default_factory=dict)
    _rows: float = 0.0
    _load: int = 0  # the logarithm of the rows, about
    _block: _Block = field(default_factory=lambda: _Block(early=False))
    _before: _Block | None = None  # the first of the pair

    @property
    def pays(self) -> bool:
        """Whether a step is to be planned while another runs; for now, where it is not clear."""
        known = self._known
        return known.evidence > 0 if known.rest else self._block.early

    def took(self, rows: int, prompt: int, period: float, computed: float) -> None:
        """A step of so many rows and tokens of prompts ended `period` seconds after the one before it.

        The runner computed for `computed` seconds.
        """
        self._note(rows)
        typical = self._known.typical.setdefault(prompt.bit_length(), _Typical())
        kept = typical.learn(period / rows)
        if self._known.rest:
            self._known.rest -= 1
            return
        block = self._block
        block.steps += 1
        if block.steps > SETTLING:
            block.typical += rows * typical.seconds
            block.kept += rows * kept
            block.whole += period
            block.computed += computed
        if block.steps == SETTLING + COUNTED:
            self._judge(block)

    @property
    def _known(self) -> _Load:
        return self._loads.setdefault(self._load, _Load())

    def _note(self, rows: int) -> None:
        """The load is that of the last steps; another one has its own evidence, and what was begun is dropped."""
        self._rows += (rows - self._rows) / (SMOOTH if self._rows else 1)
        if abs(log2(self._rows) - self._load) > CLEAR_OF:
            self._load = round(log2(self._rows))
            self._begin(early=False)

    def _begin(self, early: bool, before: _Block | None = None) -> None:
        self._block, self._before = _Block(early), before

    def _judge(self, block: _Block) -> None:
        """The end of a block. The order within pairs alternates: waited, early; early, waited; and so on."""
        if not block.early and block.hideable < LEAST_GAIN:
            self._begin(early=False)  # what could be won is too little to try for, until it is more
        elif self._before is None:
            self._begin(not block.early, block)
        else:
            early, waited = (block, self._before) if block.early else (self._before, block)
            gain = log(early.speed / waited.speed) - LEAST_GAIN
            self._add(max(-MOST_GAIN, min(MOST_GAIN, gain)))
            self._begin(block.early)

    def _add(self, evidence: float) -> None:
        known = self._known
        known.evidence = max(-1.0, min(1.0, known.evidence + evidence))
        if abs(known.evidence) == 1.0:
            known.rest, known.next_rest = known.next_rest, min(REST, 2 * known.next_rest)
