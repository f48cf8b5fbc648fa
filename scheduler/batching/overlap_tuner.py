"""Whether planning a step while another one runs pays at this load: measured by trying both. Knows no clock.

An early plan hides the host's part of a step, but where cores are few it takes cores from the runner, and the step may
become longer by more than was hidden. Neither the model nor the machine tells in advance. So blocks of steps are
planned late (after the last step's end) and early in turn, and the results of pairs of blocks add up to the evidence:

    +1  --------------x ........................x.x   plans early, and tries one more pair after a long pause
                   x                             x
     0  .......x.x....... pairs, one after another
         x.x.x
    -1  -------------------------------------------   plans late, likewise

Where the runner computes all the time in a late block there is nothing to hide, and no pair is begun.

A pair compares the time per row of its two blocks. Each step's time is taken relative to what is typical of steps with
about as many prompt tokens, so that a block in which more requests arrived does not count as a slower one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log, log2

LEAST_GAIN = 0.05  # a request that arrives after an early plan waits up to one step more: less gain is not worth it
MOST_GAIN = 0.25  # the most that one pair of blocks adds to the evidence: a larger difference is noise
FIRST_EVIDENCE = -0.5  # starts near planning late, which is no slower than a window of one step
SETTLING_STEPS = 3  # at the beginning of a block, not counted: they still show the block before
COUNTED_STEPS = 12
FIRST_PAUSE, LONGEST_PAUSE = 250, 2000  # steps between pairs once the evidence is clear: short while much warms up
OUTLIER = 3.0  # times what is typical: more counts as that
TYPICAL_STEPS = 64  # of the moving average of a step's time
LOAD_STEPS = 8  # of the moving average of the rows
LOAD_MARGIN = 0.75  # of a doubling: if the rows move by more, it is another load


@dataclass
class _TypicalTime:
    """The usual seconds of a row in one kind of step."""

    seconds: float = 0.0
    steps: int = 0

    def learn(self, seconds: float) -> float:
        """Adds a step's time; returns it, reduced if it is an outlier."""
        kept = min(seconds, OUTLIER * self.seconds) if self.steps else seconds
        self.steps = min(self.steps + 1, TYPICAL_STEPS)
        self.seconds += (kept - self.seconds) / self.steps
        return kept


@dataclass
class _Load:
    """What is known at about one number of rows."""

    evidence: float = FIRST_EVIDENCE  # from -1 to 1
    pause: int = 0  # steps until the next pair of blocks
    next_pause: int = FIRST_PAUSE
    typical: dict[int, _TypicalTime] = field(default_factory=dict)  # by the logarithm of the prompt tokens


@dataclass
class _Block:
    """Consecutive steps that were all planned late, or all planned early where they could be. Times in seconds."""

    early: bool
    steps: int = 0
    typical: float = 0.0
    measured: float = 0.0  # with outliers reduced
    period: float = 0.0
    computed: float = 0.0

    @property
    def speed(self) -> float:
        """Relative to what is typical."""
        return self.typical / self.measured

    @property
    def hideable(self) -> float:
        """The share of the time in which the runner computed nothing: of a late block, the most that can be gained."""
        return 1 - self.computed / self.period


@dataclass
class OverlapTuner:
    """Decides whether the next step is planned early, from the times of the steps before."""

    _loads: dict[int, _Load] = field(default_factory=dict)
    _rows: float = 0.0  # a moving average
    _load: int = 0  # the logarithm of the rows, rounded
    _block: _Block = field(default_factory=lambda: _Block(early=False))
    _first_of_pair: _Block | None = None

    @property
    def pays(self) -> bool:
        """Whether a step is to be planned while another runs; within a pair, what its present block tries."""
        known = self._known
        return known.evidence > 0 if known.pause else self._block.early

    def step_took(self, rows: int, prompt_tokens: int, period: float, computed: float) -> None:
        """A step ended `period` seconds after the one before it; the runner computed for `computed` of them."""
        self._track_load(rows)
        typical = self._known.typical.setdefault(prompt_tokens.bit_length(), _TypicalTime())
        kept = typical.learn(period / rows)
        if self._known.pause:
            self._known.pause -= 1
            return
        block = self._block
        block.steps += 1
        if block.steps > SETTLING_STEPS:
            block.typical += rows * typical.seconds
            block.measured += rows * kept
            block.period += period
            block.computed += computed
        if block.steps == SETTLING_STEPS + COUNTED_STEPS:
            self._end_block(block)

    @property
    def _known(self) -> _Load:
        return self._loads.setdefault(self._load, _Load())

    def _track_load(self, rows: int) -> None:
        """Follows the rows of the last steps. Another load has its own evidence, and the pair under way is dropped."""
        self._rows += (rows - self._rows) / (LOAD_STEPS if self._rows else 1)
        if abs(log2(self._rows) - self._load) > LOAD_MARGIN:
            self._load = round(log2(self._rows))
            self._begin_block(early=False)

    def _begin_block(self, early: bool, first_of_pair: _Block | None = None) -> None:
        self._block, self._first_of_pair = _Block(early), first_of_pair

    def _end_block(self, block: _Block) -> None:
        """Judges a pair at its end. The order within pairs alternates: late, early; early, late; and so on."""
        if not block.early and block.hideable < LEAST_GAIN:
            self._begin_block(early=False)  # there is too little to gain
        elif self._first_of_pair is None:
            self._begin_block(not block.early, block)
        else:
            early, late = (block, self._first_of_pair) if block.early else (self._first_of_pair, block)
            gain = log(early.speed / late.speed) - LEAST_GAIN
            self._add_evidence(max(-MOST_GAIN, min(MOST_GAIN, gain)))
            self._begin_block(block.early)

    def _add_evidence(self, evidence: float) -> None:
        known = self._known
        known.evidence = max(-1.0, min(1.0, known.evidence + evidence))
        if abs(known.evidence) == 1.0:
            known.pause, known.next_pause = known.next_pause, min(LONGEST_PAUSE, 2 * known.next_pause)
