"""Rewards by others, ready for ``python -m nemo_warp.rewards.serve --callable module:function``.

A reward is a callable ``(prompt: str, response: str) -> float``. One whose scores depend on an
installed package says so in its ``distributions``, whose versions then enter its fingerprint.
"""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader_compound(prompt: str, response: str) -> float:
    """VADER's compound sentiment of the response, in [-1, 1] (Hutto & Gilbert, 2014)."""
    return _vader().polarity_scores(response)["compound"]


def textblob_polarity(prompt: str, response: str) -> float:
    """TextBlob's polarity of the response, in [-1, 1]: mean of a lexicon's words (Loria, 2013)."""
    from textblob import TextBlob

    return TextBlob(response).sentiment.polarity


vader_compound.distributions = ("vaderSentiment",)  # type: ignore[attr-defined]
textblob_polarity.distributions = ("textblob",)  # type: ignore[attr-defined]
