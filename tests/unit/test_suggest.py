"""The suggestion for an unknown name."""

from __future__ import annotations

import pytest

from grpo.suggest import suggest


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("answr", "; did you mean answer?"),
        ("questoin", "; did you mean question?"),
        ("zzz", ""),  # no letter in common
        ("", ""),
    ],
)
def test_the_nearest_name_is_suggested(name: str, words: str) -> None:
    assert suggest(name, ["question", "answer"]) == words


def test_the_text_of_a_mapping_is_shown() -> None:
    assert suggest("mth.py", {"math.py": "reward_fns/math.py", "gsm8k.py": "x"}) == "; did you mean reward_fns/math.py?"


def test_half_of_the_letters_are_enough() -> None:
    """The similarity is 2 * (letters in common) / (letters of both): 4 / 8 for abxy, 2 / 8 for axyz."""
    assert suggest("abxy", ["abcd"]) == "; did you mean abcd?"
    assert suggest("axyz", ["abcd"]) == ""
