"""Rewards of GRPO: what the built-in ones give, how they are weighed and compared, and what happens when one fails."""

from __future__ import annotations

import hashlib
import math
import platform
from typing import Any

import pytest
from pydantic import ValidationError

from taskoffer.api.contract import BuiltinReward, GRPOColumns, GRPOSettings
from taskoffer_trainer.builtin_rewards import builtin_function, words_of
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.rewards import Asked, RewardSet, advantages, check_rewards, normalised_weights, weighted
from taskoffer_trainer.seccomp import ARCHITECTURES

SETTINGS = GRPOSettings(reward_call_seconds=2.0, reward_failures=3)

needs_sandbox = pytest.mark.skipif(
    platform.machine() not in ARCHITECTURES, reason=f"THE SANDBOX HAS NO LIST OF SYSTEM CALLS FOR {platform.machine()}"
)

# Flesch: 206.835 - 1.015 words/sentences - 84.6 syllables/words.
BUILTINS: dict[str, tuple[dict[str, Any], str, Any, float | None]] = {
    "the wanted length": ({"name": "LengthTarget", "words": 4}, "one two three four", None, 1.0),
    "half of the wanted length": ({"name": "LengthTarget", "words": 4}, "one two", None, 0.5),
    "one word too many of four": ({"name": "LengthTarget", "words": 4}, "a b c d e", None, 0.75),
    "more than twice the wanted length": ({"name": "LengthTarget", "words": 2}, "a b c d e", None, 0.0),
    "nothing where a length is wanted": ({"name": "LengthTarget", "words": 2}, "", None, 0.0),
    "the very answer": ({"name": "ExactMatch"}, " Paris \n", "Paris", 1.0),
    "the answer with other space": ({"name": "ExactMatch"}, "New  York", "New York", 1.0),
    "the answer in other letters": ({"name": "ExactMatch"}, "paris", "Paris", 0.0),
    "more than the answer": ({"name": "ExactMatch"}, "It is Paris", "Paris", 0.0),
    "an answer that is a number": ({"name": "ExactMatch"}, "42", 42, 1.0),
    "no answer to compare with": ({"name": "ExactMatch"}, "Paris", None, None),
    "the last number": ({"name": "NumberMatch"}, "3 + 4 gives 7.", "The answer is 7", 1.0),
    "another number": ({"name": "NumberMatch"}, "3 + 4 gives 8", 7, 0.0),
    "the same number written otherwise": ({"name": "NumberMatch"}, "about 1,234.50", "1234.5", 1.0),
    "a negative number": ({"name": "NumberMatch"}, "it is -5", "-5", 1.0),
    "a difference is no negative number": ({"name": "NumberMatch"}, "10-5", "5", 1.0),
    "no number said": ({"name": "NumberMatch"}, "seven", "7", 0.0),
    "an answer without a number": ({"name": "NumberMatch"}, "7", "seven", None),
    "an object": ({"name": "JSONValid"}, '{"a": [1, 2.5, null]}', None, 1.0),
    "a list in a fence": ({"name": "JSONValid"}, "```json\n[1]\n```", None, 1.0),
    "a bare number is no document": ({"name": "JSONValid"}, "1", None, 0.0),
    "text around an object": ({"name": "JSONValid"}, 'Here: {"a": 1}', None, 0.0),
    "what only JavaScript knows": ({"name": "JSONValid"}, "[NaN]", None, 0.0),
    "an object that is nested without end": ({"name": "JSONValid"}, "[" * 100000, None, 0.0),
    "one of two keywords": ({"name": "KeywordShare", "keywords": ["cat", "big dog"]}, "A Cat!", None, 0.5),
    "both keywords": ({"name": "KeywordShare", "keywords": ["cat", "big dog"]}, "big dog, CAT", None, 1.0),
    "a keyword within a word": ({"name": "KeywordShare", "keywords": ["cat"]}, "catalogue", None, 0.0),
    "a keyword with signs": ({"name": "KeywordShare", "keywords": ["c++"]}, "use C++.", None, 1.0),
    # 6 words of one syllable in 2 sentences: 206.835 - 1.015 * 3 - 84.6 = 119.19, which counts as 100.
    "very easy to read": ({"name": "Readability"}, "The cat sat. The dog ran!", None, 1.0),
    # 5 words in 1 sentence; 2 + 1 + 3 + 2 + 3 = 11 syllables: 206.835 - 5.075 - 84.6 * 2.2 = 15.64.
    "hard to read": ({"name": "Readability"}, "Complex is difficult reading material.", None, 0.1564),
    "hard to read as wanted": (
        {"name": "Readability", "ease": 20},
        "Complex is difficult reading material.",
        None,
        0.9564,
    ),
    "easier than wanted": ({"name": "Readability", "ease": 60}, "The cat sat. The dog ran!", None, 0.6),
    "nothing to read": ({"name": "Readability", "ease": 0}, "...", None, 0.0),
    "three words of four are different": ({"name": "VocabularyDiversity"}, "the cat The dog", None, 0.75),
    "no words": ({"name": "VocabularyDiversity"}, "", None, 0.0),
    "no repetition": ({"name": "RepetitionPenalty", "ngram": 2}, "a b c d", None, 0.0),
    # Pairs: ab, ba, ab: 2 of 3 are different.
    "a pair twice": ({"name": "RepetitionPenalty", "ngram": 2}, "a b a b", None, -1 / 3),
    # 4-grams of "a" seven times: 4, of which 1 is different.
    "one word again and again": ({"name": "RepetitionPenalty"}, "a a a a a a a", None, -0.75),
    "too short to repeat": ({"name": "RepetitionPenalty"}, "a a a", None, 0.0),
}


@pytest.mark.parametrize(("builtin", "text", "extra", "expected"), BUILTINS.values(), ids=BUILTINS.keys())
def test_a_builtin_reward_gives_what_was_computed_by_hand(
    builtin: dict[str, Any], text: str, extra: Any, expected: float | None
) -> None:
    reward = builtin_function(BuiltinReward.model_validate(builtin))
    assert reward(text, extra) == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_words_are_found_in_other_scripts_and_with_apostrophes() -> None:
    assert words_of("Don't stop—naïve Straße, 東京 2x!") == ["don't", "stop", "naïve", "straße", "東京", "2x"]


def columns(*functions: dict[str, Any], **more: Any) -> GRPOColumns:
    return GRPOColumns.model_validate({"rewardFunctions": list(functions), **more})


def source(text: str, name: str = "mine", **more: Any) -> dict[str, Any]:
    return {"name": name, "source": text, **more}


GOOD = "def reward(completions, **kwargs):\n    return [1.0 for _ in completions]\n"

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another hash": (
        source(GOOD, sha256="0" * 64),
        r"\(mine\): the SHA-256 of source is [0-9a-f]{64}, and sha256 says",
    ),
    "no Python": (source("def reward(completions)\n    return []"), r"\(mine\): line 1: expected ':'"),
    "no function": (source("REWARD = 1"), r"exactly one function .* \(there is none\): write def reward"),
    "a function of something else": (source("def reward(prompts): return []"), r"exactly one function"),
    "two functions": (
        source("def a(completions): return []\ndef b(completions): return []"),
        r"exactly one function .* \(a, b\)",
    ),
    "a function in a class": (source("class A:\n    def reward(completions): return []"), r"there is none"),
    "a coroutine": (source("async def reward(completions): return []"), r"reward is async: write def"),
    "no text that Python can hold": (source("x = '\0'"), r"\(mine\): "),
    "nested too deeply": (source("(" * 5000 + ")" * 5000), r"\(mine\): "),
    "no pattern": ({"name": "mine", "builtin": {"name": "PatternMatch", "pattern": "(a"}}, r"is no regular expression"),
}


@pytest.mark.parametrize(("function", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_a_reward_that_cannot_work_is_refused_without_being_run(function: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainerError, match=said) as refused:
        check_rewards(columns(function))
    assert (refused.value.code, refused.value.reason) == (64, "RewardInvalid")
    assert "data.grpo.rewardFunctions[0]" in refused.value.message


def test_helpers_and_a_matching_hash_are_accepted() -> None:
    text = "import re\n\ndef helper(text):\n    return 1.0\n\ndef mine(completions, extra_data=None):\n    return []\n"
    check_rewards(columns(source(text, sha256=hashlib.sha256(text.encode()).hexdigest())))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ({"name": "r"}, "exactly one of builtin and source"),
        (source(GOOD, builtin={"name": "JSONValid"}), "exactly one of builtin and source"),
        ({"name": "r", "builtin": {"name": "JSONValid"}, "sha256": "0" * 64}, "sha256 is the hash of source"),
        ({"name": "r", "builtin": {"name": "LengthTarget"}}, "builtin.words goes with LengthTarget"),
        ({"name": "r", "builtin": {"name": "JSONValid", "words": 3}}, "builtin.words goes with LengthTarget"),
        ({"name": "r", "builtin": {"name": "JSONValid", "ngram": 3}}, "parameter of RepetitionPenalty alone"),
        ({"name": "r", "builtin": {"name": "ExactMatch"}}, "set grpo.extraColumn"),
        (source(GOOD, weight="0"), "weights of rewardFunctions are all 0"),
    ],
)
def test_a_reward_that_contradicts_itself_is_refused_by_its_type(function: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        columns(function)


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="a name of its own"):
        columns(source(GOOD), source(GOOD))


def test_weights_are_scaled_to_a_sum_of_one() -> None:
    made = columns(source(GOOD, "a", weight="1"), source(GOOD, "b", weight="3"), source(GOOD, "c", weight="0"))
    assert normalised_weights(made.reward_functions) == {"a": 0.25, "b": 0.75, "c": 0.0}


def test_the_weighted_sum_leaves_out_what_does_not_apply() -> None:
    rewards = {"a": [1.0, None, None], "b": [2.0, 2.0, None]}
    assert weighted(rewards, {"a": 0.25, "b": 0.75}) == [1.75, 1.5, None]


@pytest.mark.parametrize(
    ("totals", "group", "scale", "expected"),
    [
        ([1.0, 3.0], 2, False, [-1.0, 1.0]),
        # The sample deviation of 1 and 3 is the root of 2.
        ([1.0, 3.0], 2, True, [-1 / (math.sqrt(2) + 1e-4), 1 / (math.sqrt(2) + 1e-4)]),
        ([5.0, 5.0, 5.0], 3, True, [0.0, 0.0, 0.0]),
        ([1.0, 3.0, 10.0, 20.0], 2, False, [-1.0, 1.0, -5.0, 5.0]),
        ([1.0, None, 3.0], 3, False, [-1.0, 0.0, 1.0]),
        ([None, None], 2, True, [0.0, 0.0]),
        ([7.0, None], 2, True, [0.0, 0.0]),
    ],
)
def test_an_advantage_is_the_distance_from_the_mean_of_the_group(
    totals: list[float | None], group: int, scale: bool, expected: list[float]
) -> None:
    assert advantages(totals, group, scale) == pytest.approx(expected)


@needs_sandbox
def test_a_reward_set_gives_every_reward_to_every_completion() -> None:
    made = columns(
        source("def reward(completions, prompts, answer, extra_data):\n    return [float(answer == extra_data)] * 2"),
        {"name": "found", "builtin": {"name": "PatternMatch", "pattern": "a.c"}},
        {"name": "same", "builtin": {"name": "ExactMatch"}, "weight": "2"},
        extraColumn="answer",
    )
    asked = Asked(["p", "q"], ["a\nc", "b"], ["b", "b"])
    with RewardSet(made, SETTINGS) as rewards:
        rewards.try_out(asked)
        found = rewards(asked)
        report = rewards.report()
    assert found == {"mine": [1.0, 1.0], "found": [1.0, 0.0], "same": [0.0, 1.0]}
    assert weighted(found, rewards.weights) == pytest.approx([0.5, 0.75])
    assert [(one["name"], one["sandboxed"]) for one in report["functions"]] == [
        ("mine", True),
        ("found", True),
        ("same", False),
    ]
    assert report["sandbox"]["network"] in ("network-namespace", "seccomp")


@needs_sandbox
def test_a_failed_call_gives_no_reward_and_several_in_a_row_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = "def reward(completions):\n    return [{'good': 1.0}[text] for text in completions]"
    with RewardSet(columns(source(text)), SETTINGS) as rewards:
        good, bad = Asked(["p"], ["good"], [None]), Asked(["p"], ["bad"], [None])
        expected = [[None], [None], [1.0], [None], [None]]
        assert [rewards(asked)["mine"] for asked in (bad, bad, good, bad, bad)] == expected
        with pytest.raises(TrainerError, match=r"mine failed 3 times in a row.*KeyError in line 2: 'bad'") as ended:
            rewards(bad)
        functions = rewards.report()["functions"]
    assert (ended.value.code, ended.value.reason) == (64, "RewardFailed")
    assert "mend it or remove it" in ended.value.message
    assert (functions[0]["calls"], functions[0]["failedCalls"]) == (6, 5)
    assert "a call of mine failed (2 in a row): KeyError in line 2: 'bad'" in capsys.readouterr().out


@needs_sandbox
def test_in_an_evaluation_a_failed_call_is_made_once_more() -> None:
    text = (
        "calls = []\ndef reward(completions):\n    calls.append(1)\n"
        "    if len(calls) in (1, 3, 4): raise ValueError\n    return [float(len(calls))]"
    )
    builtin = {"name": "same", "builtin": {"name": "LengthTarget", "words": 1}}
    asked = Asked(["p"], ["c"], [None])
    with RewardSet(columns(source(text), builtin), SETTINGS) as rewards:
        assert rewards.measured(asked) == {"mine": [2.0], "same": [1.0]}
        assert rewards.measured(asked) == {"mine": None, "same": [1.0]}
        assert rewards.measured(asked, without={"mine"}) == {"same": [1.0]}
        assert rewards.measured(asked) == {"mine": [5.0], "same": [1.0]}
        assert rewards.report()["functions"][0]["failedCalls"] == 3


@needs_sandbox
def test_evaluations_that_fail_one_after_the_other_are_none_and_only_a_step_ends_the_run() -> None:
    """One rank alone would leave the others waiting, and the last evaluations must not cost a finished training."""
    bad = Asked(["p"], ["bad"], [None])
    with RewardSet(columns(source("def reward(completions):\n    raise ValueError")), SETTINGS) as rewards:
        assert [rewards.measured(bad) for _ in range(3)] == [{"mine": None}] * 3
        with pytest.raises(TrainerError, match="mine failed 7 times in a row"):
            rewards(bad)


@needs_sandbox
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import detoxify\n" + GOOD, "only Python's standard library is in the sandbox"),
        ("def reward(completions): return 1", "returned int"),
        ("def reward(completions):\n    while True: pass", "took longer than the 2 s"),
    ],
)
def test_a_reward_that_fails_when_it_is_tried_out_ends_the_run_at_once(text: str, said: str) -> None:
    with (
        RewardSet(columns(source(text)), SETTINGS) as rewards,
        pytest.raises(TrainerError, match=f"mine fails when it is tried out: .*{said}") as refused,
    ):
        rewards.try_out(Asked(["p"], ["c"], [None]))
    assert (refused.value.code, refused.value.reason) == (64, "RewardInvalid")
