"""Measures whether it is faster at the present load to plan a step while another one runs, by trying both.

An early plan hides the host's part of a step. But if there are few cores, it takes cores from the runner, and the step
may become longer by more than was hidden. This cannot be predicted from the model or the machine. So steps are planned
late (after the last step's end) and early in alternating blocks, and the results of pairs of blocks are summed up as
the evidence:

    +1  --------------x ........................x.x   plans early, and tries one more pair after a long pause
                   x                             x
     0  .......x.x....... pairs, one after another
         x.x.x
    -1  -------------------------------------------   plans late, and tries one more pair after a long pause

If the runner computes all the time in a late block, there is nothing to hide, and no pair is begun.

A pair compares the time per row of its two blocks. Each step's time is taken relative to what is typical of steps with
about as many prompt tokens, so that a block in which more requests arrived does not count as a slower one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log, log2

LEAST_GAIN = 0.05  # the least gain worth overlapping: requests that arrive after an early plan wait up to a step more
MOST_GAIN = 0.25  # the most that one pair of blocks adds to the evidence: a larger difference is noise
FIRST_EVIDENCE = -0.5  # the evidence at the start: in favor of planning late, no slower than a window of one step
SETTLING_STEPS = 3  # steps at the beginning of a block that are not counted: the block before still affects them
COUNTED_STEPS = 12  # steps of a block that are counted
FIRST_PAUSE, LONGEST_PAUSE = 250, 2000  # steps between pairs at clear evidence: first short, then doubled each time
OUTLIER = 3.0  # a step's time is cut to this multiple of the typical time
TYPICAL_STEPS = 64  # steps in the moving average of a step's time
LOAD_STEPS = 8  # steps in the moving average of the rows
LOAD_MARGIN = 0.75  # how far, in doublings, the average of the rows must move to count as another load


@dataclass
class _TypicalTime:
    """The moving average of the seconds per row in steps with about equally many prompt tokens."""

    seconds: float = 0.0
    steps: int = 0

    def learn(self, seconds: float) -> float:
        """Adds a step's seconds per row to the average. Returns them, cut to OUTLIER times the average."""
        kept = min(seconds, OUTLIER * self.seconds) if self.steps else seconds
        self.steps = min(self.steps + 1, TYPICAL_STEPS)
        self.seconds += (kept - self.seconds) / self.steps
        return kept


@dataclass
class _Load:
    """What was measured at loads of about one number of rows."""

    evidence: float = FIRST_EVIDENCE  # from -1 to 1
    pause: int = 0  # steps until the next pair of blocks
    next_pause: int = FIRST_PAUSE  # the length of the next pause, in steps
    typical: dict[int, _TypicalTime] = field(default_factory=dict)  # by the bit length of the prompt tokens


@dataclass
class _Block:
    """Consecutive steps that were all planned late, or all planned early where they could be. Times in seconds."""

    early: bool
    steps: int = 0
    typical: float = 0.0  # the sum of the times that are typical of the counted steps
    measured: float = 0.0  # the sum of their measured times, with outliers cut
    period: float = 0.0  # the sum of their measured times
    computed: float = 0.0  # the part of `period` in which the runner computed

    @property
    def speed(self) -> float:
        """The speed of the block's steps relative to what is typical (1.0)."""
        return self.typical / self.measured

    @property
    def hideable(self) -> float:
        """The share of the time in which the runner did not compute. In a late block: the most that can be gained."""
        return 1 - self.computed / self.period


@dataclass
class OverlapTuner:
    """Decides from the times of earlier steps whether the next step is planned early."""

    _loads: dict[int, _Load] = field(default_factory=dict)  # by the rounded log2 of the rows
    _rows: float = 0.0  # the moving average of a step's rows
    _load: int = 0  # the present load: the log2 of the rows, rounded
    _block: _Block = field(default_factory=lambda: _Block(early=False))
    _first_of_pair: _Block | None = None

    @property
    def pays(self) -> bool:
        """Whether to plan a step while another one runs. During a pair of blocks, each block tries one or the other."""
        known = self._known
        return known.evidence > 0 if known.pause else self._block.early

    def step_took(self, rows: int, prompt_tokens: int, period: float, computed: float) -> None:
        """Records the times of a step with `rows` rows.

        The step ended `period` seconds after the previous step. The runner computed for `computed` of these seconds.
        """
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
        """Updates the average of the rows. If this is another load now, switches to its evidence and drops the pair."""
        self._rows += (rows - self._rows) / (LOAD_STEPS if self._rows else 1)
        if abs(log2(self._rows) - self._load) > LOAD_MARGIN:
            self._load = round(log2(self._rows))
            self._begin_block(early=False)

    def _begin_block(self, early: bool, first_of_pair: _Block | None = None) -> None:
        self._block, self._first_of_pair = _Block(early), first_of_pair

    def _end_block(self, block: _Block) -> None:
        """Begins the next block. After the second block of a pair, first adds the pair's result to the evidence.

        The order within pairs alternates: late, early; early, late; and so on.
        """
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
