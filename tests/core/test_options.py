"""Options: sizes, booleans, dotted keys, nesting, and the dataclasses that drivers declare."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import string
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fusedisk.core.errors import OptionError
from fusedisk.core.options import (
    Options,
    flatten,
    nest,
    option,
    parse_bool,
    parse_int,
    parse_json,
    parse_options,
    parse_size,
    split_dotted,
)

UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}

NAMES = st.text(string.ascii_lowercase + "-_", min_size=1, max_size=8)
VALUES = st.text(max_size=12) | st.booleans() | st.integers() | st.none()
TREES = st.recursive(
    VALUES,
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=3),
    max_leaves=12,
)


# --- sizes ----------------------------------------------------------------------------------------------


@given(st.integers(0, (1 << 63) - 1), st.sampled_from(sorted(UNITS)), st.sampled_from(("", "b", "iB")), st.booleans())
def test_every_whole_number_with_a_unit(number: int, unit: str, suffix: str, upper: bool) -> None:
    unit_text = unit.upper() if upper else unit
    text = f"{number}{unit_text}{suffix if unit else ''}"
    size = number << 10 * UNITS[unit]
    if size < 1 << 63:
        assert parse_size(text) == size
        assert parse_size(f"{size:#x}") == size
    else:
        with pytest.raises(OptionError, match=r"must lie between 0 and 2\^63 - 1"):
            parse_size(text)


@given(st.text(max_size=30))
@example("9" * 400)
@example("9" * 5000)
@example("9" * 400 + ".5")
@example("1." + "0" * 5000)
def test_any_text_is_a_size_or_refused_in_a_sentence(text: str) -> None:
    with contextlib.suppress(OptionError):
        assert 0 <= parse_size(text) < 1 << 63


def test_fractions_are_exact_and_round_down() -> None:
    assert parse_size("1.5T") == 3 << 39
    assert parse_size("0.1k") == 102
    assert parse_size("4503599627370497.75k") == 4503599627370497 * 1024 + 768


NO_NUMBERS = (
    *(" 512", "512 ", "5 k", "\t5", "5\n", "+512", "1_000", "٣", "²", "５", "\u212a", "1\u212a", "nan", "inf", 1e300),
    *("0b1", "0o7", "0x", "0x1k", "0x1.8", "-0x1", "0x1_0", "0x٣", "0x" + "1" * 17),
)
"""What Python or its regular expressions would take for numbers, and QEMU does not, or only by mistake."""


@pytest.mark.parametrize("text", ["1.5", "0.5b", 4096.5])
def test_a_part_of_a_byte_is_no_size(text: Any) -> None:
    with pytest.raises(OptionError, match=r"the size is '.*', expected a whole number of bytes"):
        parse_size(text, "the size")
    assert parse_size("1.0") == 1


@pytest.mark.parametrize(("text", "number"), [("12", 12), ("-1", -1), ("010", 10), ("0x1F", 31), (7, 7)])
def test_whole_numbers(text: str | int, number: int) -> None:
    assert parse_int(text, "the number") == number


@pytest.mark.parametrize("value", ["", "1.0", "1e3", 1.0, True, None, "4k", "9" * 5000, *NO_NUMBERS])
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(OptionError, match=r"(?s)the number is '.*', expected a whole number"):
        parse_int(value, "the number")


@pytest.mark.parametrize("text", ["", "10X", "-1", "1e6", "k", "10 0", "1.", ".5", True, None, *NO_NUMBERS])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(OptionError, match=r"(?s)the size is .*, expected a number of bytes, such as 4096, 512M or 10G"):
        parse_size(text, "the size")


@pytest.mark.parametrize("value", [True, "on", "ON", "true", "yes", "1"])
def test_true(value: object) -> None:
    assert parse_bool(value, "x") is True


@pytest.mark.parametrize("value", [False, "off", "False", "no", "0"])
def test_false(value: object) -> None:
    assert parse_bool(value, "x") is False


@pytest.mark.parametrize("value", ["", "maybe", 2, None, []])
def test_neither_true_nor_false(value: object) -> None:
    with pytest.raises(OptionError, match="expected 'on' or 'off'"):
        parse_bool(value, "x")


# --- dotted keys ----------------------------------------------------------------------------------------


@given(st.dictionaries(st.text("abc.-", min_size=1, max_size=5), st.text("ab,= x", max_size=9), min_size=1, max_size=4))
@example({"a": ",", "b": ",,"})
@example({"a": "x,,", "b": ""})
def test_dotted_text_gives_back_what_was_joined(flat: dict[str, str]) -> None:
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in flat.items())
    assert split_dotted(text) == flat


@pytest.mark.parametrize("text", ["driver", "=x", "a=1,", ",a=1", "a=1,b"])
def test_dotted_text_that_is_wrong(text: str) -> None:
    with pytest.raises(OptionError, match="expected KEY=VALUE"):
        split_dotted(text)


def test_dotted_text_with_a_key_given_twice() -> None:
    with pytest.raises(OptionError, match="'a' is given twice"):
        split_dotted("a=1,b=2,a=3")


# --- nesting --------------------------------------------------------------------------------------------


@given(st.dictionaries(NAMES, TREES, max_size=4))
def test_nesting_undoes_flattening(tree: dict[str, Any]) -> None:
    assert nest(flatten(tree)) == tree


@given(st.dictionaries(NAMES, TREES, max_size=4))
def test_flat_keys_are_values(tree: dict[str, Any]) -> None:
    assert not any(isinstance(value, dict | list) for value in flatten(tree).values())


@given(st.dictionaries(NAMES, TREES, max_size=4))
def test_json_and_half_nested_json_mean_the_same(tree: dict[str, Any]) -> None:
    assert parse_json(json.dumps(tree)) == tree
    assert parse_json(json.dumps(flatten(tree))) == tree
    assert parse_options(" " + json.dumps(tree)) == tree


@pytest.mark.parametrize(
    ("flat", "sentence"),
    [
        ({"a": 1, "a.b": 2}, "'a' is given as a value and as the group of 'a.b'"),
        ({"a.b": 2, "a": 1}, "'a' is given as a value and as a group"),
        ({"a.b": 2, "a": {"b": 1}}, "'a.b' is given twice"),
        ({"a": {"00": 1}}, "list indices 00 do not run from 0"),
        ({"a": {"\u00b2": 1}}, "list indices \u00b2 do not run from 0"),
        ({"a.0": 1, "a.2": 2}, "list indices 0, 2 do not run from 0 without gaps"),
    ],
)
def test_contradicting_keys(flat: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        nest(flat)


@pytest.mark.parametrize("text", ["{", "[1]", "3", '{"a": ', '{"a":' * 20000, '{"a":' * 900 + "1" + "}" * 900])
def test_json_that_is_wrong_or_too_deep(text: str) -> None:
    with pytest.raises(OptionError, match="JSON options"):
        parse_json(text)


# --- dataclasses ----------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _ToyOptions(Options):
    size: int = option(0, kind="size", help="a size")
    read_zeroes: bool = option(False, kind="bool", help="a switch")
    count: int = option(1, kind="int", help="a number")
    mode: str = option("slow", choices=("slow", "fast"), help="a choice")


def test_text_becomes_typed_values() -> None:
    parsed = _ToyOptions.parse({"size": "4k", "read-zeroes": "on", "count": "-3", "mode": "fast"}, "toy")
    assert parsed == _ToyOptions(4096, True, -3, "fast")
    assert parsed.given() == {"size": 4096, "read-zeroes": True, "count": -3, "mode": "fast"}
    assert _ToyOptions.parse({"size": None}, "toy").given() == {}


@pytest.mark.parametrize(
    ("given_options", "sentence"),
    [
        ({"sise": 1}, "toy has no option 'sise' .it has: count, mode, read-zeroes, size"),
        ({"size": "many"}, "toy option 'size' is 'many', expected a number of bytes"),
        ({"read-zeroes": "perhaps"}, "toy option 'read-zeroes' is 'perhaps', expected 'on' or 'off'"),
        ({"count": "1.5"}, "toy option 'count' is '1.5', expected a whole number"),
        ({"mode": "medium"}, "toy option 'mode' is 'medium', expected one of slow, fast"),
        ({"mode": 3}, "toy option 'mode' is a int, expected a string"),
        ({"mode": {"a": "fast"}}, "toy has no option 'mode.a'"),
    ],
)
def test_wrong_options_each_have_their_sentence(given_options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        _ToyOptions.parse(given_options, "toy")


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1])
def test_numbers_of_more_than_64_bits_are_refused_however_they_are_given(value: int) -> None:
    """Otherwise options would open that could not be printed and parsed again."""
    for text in (value, str(value)):
        with pytest.raises(OptionError, match="expected a whole number"):
            parse_int(text, "option 'n'")
    assert parse_int((1 << 64) - 1, "option 'n'") == (1 << 64) - 1
