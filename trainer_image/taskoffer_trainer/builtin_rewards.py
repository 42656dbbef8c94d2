"""The rewards that come along: pure functions of a completion, a parameter, and the answer in the extra column."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from taskoffer.api.contract import BuiltinName, BuiltinReward

__all__ = ["builtin_function", "pattern_source", "words_of"]

DEFAULT_NGRAM = 4
"""Words in a piece of the repetition penalty: Welleck et al. report repetition of 4-grams."""

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_SENTENCE_END = re.compile(r"[.!?…]+(?=\s|$)")
_VOWELS = re.compile(r"[aeiouyäöüáéíóúàèìòùâêîôû]+")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?")
_FENCED = re.compile(r"```\w*\n(.*)\n```", re.DOTALL)


def words_of(text: str) -> list[str]:
    """Return the words in lower case; an apostrophe does not end a word, a hyphen does."""
    return [word.lower() for word in _WORD.findall(text)]


def length_target(text: str, words: int) -> float:
    """Return 1 at the wanted number of words, falling evenly to 0 at none and at twice as many."""
    return max(0.0, 1.0 - abs(len(words_of(text)) - words) / words)


def exact_match(text: str, answer: str) -> float:
    """Return 1 when completion and answer are equal but for space, else 0."""
    return float(text.split() == answer.split())


def number_match(text: str, answer: str) -> float | None:
    """Return 1 when the last number of the completion equals the last one of the answer, else 0.

    Commas between digits are left out; 5 equals 5.0. Not applicable (``None``) when the answer has no number.
    """
    wanted, said = _last_number(answer), _last_number(text)
    return None if wanted is None else float(said == wanted)


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def json_valid(text: str) -> float:
    """Return 1 when the whole completion is a JSON object or list, also in a fence of code, else 0."""
    text = text.strip()
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return 0.0
    return float(isinstance(value, (dict, list)))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def keyword_share(text: str, keywords: tuple[str, ...]) -> float:
    """Return the share of the keywords that occur as whole words, in small or capital letters."""
    found = [word for word in keywords if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)]
    return len(found) / len(keywords)


def _syllables(word: str) -> int:
    """Estimate the syllables of a word: groups of vowels, without a silent e at the end."""
    groups = len(_VOWELS.findall(word))
    if word.endswith("e") and not word.endswith("le") and groups > 1:
        groups -= 1
    return max(1, groups)


def reading_ease(text: str) -> float:
    """Return the Flesch reading ease: 206.835 - 1.015 words/sentences - 84.6 syllables/words.

    R. Flesch, A new readability yardstick, Journal of Applied Psychology 32(3), 1948. Made for English; 60 to 70
    is plain English. Syllables are estimated. A text without words has 0.
    """
    words = words_of(text)
    if not words:
        return 0.0
    sentences = max(1, len(_SENTENCE_END.findall(text)))
    syllables = sum(map(_syllables, words))
    return 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)


def readability(text: str, ease: int | None) -> float:
    """Return the reading ease within 0 to 1, or 1 less its distance from the wanted one; 0 without words."""
    if not words_of(text):
        return 0.0
    found = min(100.0, max(0.0, reading_ease(text)))
    return found / 100 if ease is None else 1.0 - abs(found - ease) / 100


def vocabulary_diversity(text: str) -> float:
    """Return the type-token ratio: different words by words. Longer texts have lower ones by nature."""
    words = words_of(text)
    return len(set(words)) / len(words) if words else 0.0


def repetition_penalty(text: str, ngram: int) -> float:
    """Return minus the share of repeated n-grams, 0 (no repetition) to nearly -1.

    seq-rep-n of Welleck et al., Neural text generation with unlikelihood training, ICLR 2020 (arXiv:1908.04319).
    """
    words = words_of(text)
    pieces = [tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)]
    return len(set(pieces)) / len(pieces) - 1.0 if pieces else 0.0


def builtin_function(reward: BuiltinReward) -> Callable[[str, Any], float | None]:
    """Return the function of a built-in reward: completion and extra column in, reward out.

    Raises:
        ValueError: for ``PatternMatch``, which is run as source text (see :func:`pattern_source`).
    """

    def compared(compare: Callable[[str, str], float | None]) -> Callable[[str, Any], float | None]:
        return lambda text, extra: compare(text, str(extra)) if isinstance(extra, (str, int, float)) else None

    match reward.name:
        case BuiltinName.EXACT_MATCH:
            return compared(exact_match)
        case BuiltinName.NUMBER_MATCH:
            return compared(number_match)
        case BuiltinName.JSON_VALID:
            return lambda text, _: json_valid(text)
        case BuiltinName.READABILITY:
            return lambda text, _: readability(text, reward.ease)
        case BuiltinName.VOCABULARY_DIVERSITY:
            return lambda text, _: vocabulary_diversity(text)
        case BuiltinName.REPETITION_PENALTY:
            return lambda text, _: repetition_penalty(text, reward.ngram or DEFAULT_NGRAM)
    if reward.words is not None:
        words = reward.words
        return lambda text, _: length_target(text, words)
    if reward.keywords is not None:
        keywords = reward.keywords
        return lambda text, _: keyword_share(text, keywords)
    raise ValueError(f"{reward.name.value} is not computed here")


def pattern_source(pattern: str) -> str:
    """Return the source text of ``PatternMatch``: 1 where the pattern is found anywhere, else 0; a dot meets line ends.

    A regular expression can take for ever, so it runs where source text does.

    Raises:
        ValueError: when it is no regular expression.
    """
    try:
        re.compile(pattern, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"builtin.pattern is no regular expression: {error}") from error
    return (
        f"import re\nPATTERN = re.compile({pattern!r}, re.DOTALL)\n"
        "def reward(completions, **_):\n    return [float(PATTERN.search(text) is not None) for text in completions]\n"
    )
