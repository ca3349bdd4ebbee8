"""A checked answer in mathematics: is what the response ends with equal to the prompt's answer?

By math-verify (Hugging Face): it finds the answer in the text (in a box, after "the answer is", the
last formula), reads it as LaTeX or as an expression, and compares with SymPy.

    --callable nemo_warp.rewards.library.mathematics:Answer --concurrency 4
"""

from __future__ import annotations

import importlib.util
import logging

from nemo_warp.rewards.library.isolated import Isolated

_MARKED = ("$", "\\boxed", "\\(", "\\[")


class Answer:
    """1 where the response's answer equals the field ``answer``, else 0.

    A response in which no answer is found is wrong. An ``answer`` that cannot be read, and a
    comparison that takes too long, are failures of the reward and no number.

    Args:
        right, wrong: the two scores.
        seconds: of one comparison.
        memory_gib: that comparing may take; powers of powers take any.
    """

    distributions = ("math-verify", "latex2sympy2_extended", "sympy")

    def __init__(
        self, right: float = 1.0, wrong: float = 0.0, seconds: float = 10.0, memory_gib: float = 4.0
    ) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("it needs math-verify: pip install 'nemo-warp[mathematics]'")
        self._scores = {True: right, False: wrong}
        # math-verify's own time limits are alarms, which work in a main thread only.
        self._equal = Isolated(equal, seconds, int(memory_gib * 2**30), first=("1", "1"))

        # Otherwise a parser that does not work here would be the score 0 of every response.
        if not self._equal("\\frac{1}{2}", "\\boxed{0.5}"):
            raise ValueError("math-verify does not work here: it says that 1/2 is not 0.5")
        self._equal.close()

    def __call__(self, prompt: str, response: str, answer: str | int | float) -> float:
        """The score of one response."""
        return self._scores[self._equal(str(answer), response)]


def equal(answer: str, response: str) -> bool:
    """Whether the response's answer is the right one.

    Args:
        answer: LaTeX, a number or an expression; of GSM8K's solutions, what follows ``####``.

    Raises:
        ValueError: it cannot be read.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # says that it has no time limit
    text = answer.rpartition("####")[2].strip()
    marked = text if any(mark in text for mark in _MARKED) else f"${text}$"
    gold = parse(marked, parsing_timeout=None, raise_on_error=True)
    if not gold:
        raise ValueError(f"the answer {answer!r} cannot be read")
    found = parse(response, parsing_timeout=None)
    return bool(found) and bool(verify(gold, found, timeout_seconds=None, raise_on_error=True))
