"""Parts of messages: the suggestion for an unknown name, a list that is not too long, and an error on one line."""

from __future__ import annotations

import pytest

from grpo.suggest import first_of, one_line, suggest


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


@pytest.mark.parametrize(
    ("texts", "words"),
    [([], ""), (["a", "b"], "a, b"), (["a", "b", "c"], "a, b and 1 more"), (["a"] * 5, "a, a and 3 more")],
)
def test_a_list_is_cut_and_the_rest_is_counted(texts: list[str], words: str) -> None:
    assert first_of(texts, 2) == words


def test_ten_are_listed() -> None:
    assert first_of("abcdefghij") == "a, b, c, d, e, f, g, h, i, j"
    assert first_of("abcdefghijk") == "a, b, c, d, e, f, g, h, i, j and 1 more"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("a\n  b\tc "), "a b c"),
        (ValueError("abcdefgh"), "abcdefgh"),
        (ValueError("abcdefghi"), "abcde..."),
        (KeyError(), "KeyError"),  # it has no message
    ],
)
def test_an_error_is_put_on_one_line_of_limited_length(error: Exception, words: str) -> None:
    assert one_line(error, 8) == words


def test_an_error_has_300_characters() -> None:
    assert one_line(ValueError("x" * 300)) == "x" * 300
    assert one_line(ValueError("x" * 301)) == "x" * 297 + "..."
