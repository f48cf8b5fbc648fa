"""What a call of a key is granted: requests and tokens, charged before it runs and settled when it has ended.

    at the door       the requests (prompts x n), and the tokens that are sure: token ids, max_tokens, all times n
    once encoded      the rest of each prompt's tokens, before the prompt is sent to the scheduler
    at the end        what was not used is given back, also after an error or a disconnect

Without a length of its own, an answer may be as long as without a rate, but not so long that the call would exceed the
limit. A call that could never be granted is a 400, because trying again would not help.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import InvalidRequest, RateLimited
from engine.messages import Submit
from tokenizer_proc.http.auth.rates import Charge, Rate

_USED_UP = "this key has used up its rate; try again later"
_ADVICE = "Without max_tokens a call is charged for the longest answer that it may have, until it ends: send max_tokens"


class Grant:
    """The requests and tokens of one call. Raises RateLimited, or InvalidRequest if the limit is too small for it."""

    def __init__(self, requests: Rate, tokens: Rate, submits: Sequence[Submit]) -> None:
        self._tokens = tokens
        self._charge = Charge()
        self._choices = sum(submit.params.n for submit in submits)
        self._has_lengths = all(submit.params.max_tokens is not None for submit in submits)
        _check_fits(requests, self._choices, "requests", "requests_per_minute", "prompt")
        sure = sum(map(_sure_tokens, submits))
        self._check_tokens(sure)
        wait = max(requests.wait(), tokens.wait())
        if wait > 0:
            raise self._refusal(wait)
        self._requests, self._requests_charge = requests, Charge()
        requests.take(self._choices, self._requests_charge)
        tokens.take(sure, self._charge)
        self.used = 0
        """The tokens that the call has used, which it sets before `settle`."""
        self._unassigned = sure  # of what was taken at the door, the part that no prompt has used so far

    def reserve(self, prompt: int, choices: int, least: int, most: int) -> int:
        """Charges a prompt of `prompt` tokens with `choices` answers. Returns how many tokens each of them may have.

        That is `most`, or less if the call's answers together could not be that long within the limit, but never less
        than `least`.
        """
        length = most
        if self._tokens.limit is not None:
            share = int(self._tokens.limit // self._choices) - prompt
            length = max(least, min(most, share))
        tokens = (prompt + length) * choices
        more = max(0, tokens - self._unassigned)
        self._check_tokens(self._charge.amount + more)
        wait = self._tokens.wait(self._charge) if more else 0.0
        if wait > 0:
            raise self._refusal(wait)
        self._tokens.take(more, self._charge)
        self._unassigned -= tokens - more
        return length

    def settle(self) -> None:
        """Gives back all tokens beyond `used`."""
        self._tokens.settle(self._charge, self.used)

    def forget(self) -> None:
        """Gives back the requests too, because the call was refused for its rate."""
        self._requests.settle(self._requests_charge, 0)

    def _check_tokens(self, amount: float) -> None:
        _check_fits(self._tokens, amount, "tokens, of prompts and answers,", "tokens_per_minute", "max_tokens")

    def _refusal(self, wait: float) -> RateLimited:
        return RateLimited(_USED_UP if self._has_lengths else f"{_USED_UP}. {_ADVICE}", retry_after=wait)


class Meter:
    """The tokens of work that generates nothing. Raises RateLimited if the rate is used up.

    At most the limit is taken, so that no work is too large: what it uses beyond that is not charged.
    """

    def __init__(self, tokens: Rate, most: int) -> None:
        self._tokens = tokens
        self._charge = Charge()
        self.used = 0
        """The tokens that the work has used, which it sets before `settle`."""
        wait = tokens.wait()
        if wait > 0:
            raise RateLimited(_USED_UP, retry_after=wait)
        tokens.take(most if tokens.fits(most) else tokens.limit or 0, self._charge)

    def settle(self) -> None:
        """Gives back all tokens beyond `used`."""
        self._tokens.settle(self._charge, self.used)


def _check_fits(rate: Rate, amount: float, what: str, rule: str, param: str) -> None:
    """Raises InvalidRequest if one call may not take `amount` of a rate. `rule` is the rate's name in the key file."""
    if not rate.fits(amount):
        raise InvalidRequest(
            f"the call asks for {amount:.0f} {what} and this key has {rate.limit:g} a minute ({rule}): ask for less",
            param=param,
            code="exceeds_rate_limit",
        )


def _sure_tokens(submit: Submit) -> int:
    """Returns how many tokens a submit takes at least, before its prompt is encoded."""
    ids = 1 if isinstance(submit.prompt, str) else max(1, len(submit.prompt))
    length = submit.params.max_tokens if submit.params.max_tokens is not None else submit.params.min_tokens
    return (ids + max(1, length)) * submit.params.n
