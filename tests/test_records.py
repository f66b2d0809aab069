"""JSON in and out: what fits comes back the same, what does not is refused with its place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.errors import RecordError
from exitify.records import dumps, from_json, loads, to_json


@dataclass(frozen=True)
class Page:
    number: int
    text: str


@dataclass(frozen=True)
class Book:
    title: str
    kind: Literal["novel", "atlas"]
    price: float
    in_print: bool
    pages: tuple[Page, ...]
    size: tuple[int, int]
    notes: Mapping[str, Page | None]
    editor: str | None


BOOK = Book("Träume", "novel", 9.5, True, (Page(1, "a"), Page(2, "")), (12, 20), {"one": Page(3, "c"), "none": None}, None)
GOOD = to_json(BOOK)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
pages = st.builds(Page, st.integers(-(2**63) + 1, 2**63 - 1), st.text())
books = st.builds(
    Book,
    st.text(),
    st.sampled_from(["novel", "atlas"]),
    st.floats(-1e299, 1e299),
    st.booleans(),
    st.lists(pages, max_size=3).map(tuple),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.dictionaries(st.text(), pages | st.none(), max_size=3),
    st.none() | st.text(),
)


def changed(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


@given(books)
def test_a_record_written_and_read_is_the_same_record(book):
    assert from_json(Book, loads(dumps(book), "book"), "book") == book


@given(books)
def test_the_bytes_depend_on_the_values_alone(book):
    again = Book(**{name: getattr(book, name) for name in reversed(Book.__dataclass_fields__)})
    assert dumps(again) == dumps(book)


@given(anything)
def test_arbitrary_json_is_refused_or_comes_back_the_same(data):
    for kind in (Page, Book, int, float, str, bool, tuple[int, ...], Mapping[str, str], str | None):
        try:
            record = from_json(kind, data, "document")
        except RecordError:
            continue
        assert to_json(record) == data or isinstance(record, float)  # an int read as a float may round
        assert from_json(kind, to_json(record), "document") == record


@given(st.sampled_from(sorted(GOOD)), anything)
def test_a_record_with_one_field_replaced_is_refused_or_comes_back_the_same(name, value):
    problem = ""
    try:
        book = from_json(Book, changed(**{name: value}), "book")
    except RecordError as error:
        problem, book = error.problem, BOOK
    assert problem.startswith(f"book.{name}") or not problem
    assert from_json(Book, loads(dumps(book), "book"), "book") == book


@given(st.binary())
def test_arbitrary_bytes_are_refused_or_are_json(text):
    try:
        values = loads(text, "file")
    except RecordError:
        return
    assert values == json.loads(text)


def test_a_missing_field_is_refused_by_name():
    data = {name: value for name, value in GOOD.items() if name != "price"}
    with pytest.raises(RecordError, match="book lacks the field 'price'"):
        from_json(Book, data, "book")


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(RecordError, match=r"book\.pages\[1\] has an unknown field 'colour'\n  hint: it has number, text"):
        from_json(Book, changed(pages=[GOOD["pages"][0], {"number": 2, "text": "", "colour": 1}]), "book")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"title": 3}, "book.title is 3, not a string"),
        ({"title": None}, "book.title is None, not a string"),
        ({"kind": "map"}, "book.kind is 'map', not one of novel, atlas"),
        ({"kind": ["novel"]}, r"book.kind is \['novel'\], not one of"),
        ({"price": "9"}, "book.price is '9', not a finite number"),
        ({"price": True}, "book.price is True, not a finite number"),
        ({"price": math.nan}, "book.price is nan, not a finite number"),
        ({"price": math.inf}, "book.price is inf, not a finite number"),
        ({"in_print": 1}, "book.in_print is 1, not true or false"),
        ({"pages": {}}, "book.pages is {}, not an array"),
        ({"pages": [[]]}, r"book.pages\[0\] is \[\], not an object"),
        ({"pages": [{"number": True, "text": ""}]}, r"book.pages\[0\].number is True, not an integer"),
        ({"pages": [{"number": 1.0, "text": ""}]}, r"book.pages\[0\].number is 1.0, not an integer"),
        ({"size": [1]}, r"book.size is \[1\], not an array of 2"),
        ({"size": [1, 2, 3]}, r"book.size is \[1, 2, 3\], not an array of 2"),
        ({"notes": []}, r"book.notes is \[\], not an object"),
        ({"notes": {"x": 1}}, r"book.notes\.x is 1, not an object"),
        ({"editor": 1}, "book.editor is 1, not a string"),
    ],
)
def test_a_mistyped_field_is_refused_with_its_place(changes, problem):
    with pytest.raises(RecordError, match=problem):
        from_json(Book, changed(**changes), "book")


def test_an_integer_is_a_number():
    assert from_json(Book, changed(price=9), "book").price == 9.0
    assert isinstance(from_json(Book, changed(price=9), "book").price, float)


@pytest.mark.parametrize("number", [2**63, -(2**63), 10**400, 10**5000], ids=["2^63", "-2^63", "401 digits", "5001 digits"])
def test_an_integer_over_64_bits_is_refused(number):
    with pytest.raises(RecordError, match="not an integer"):
        from_json(int, number, "count")


@pytest.mark.parametrize("number", [10**301, 10**5000, -(10**5000)], ids=["302 digits", "5001 digits", "-5001 digits"])
def test_a_number_over_a_double_is_refused(number):
    with pytest.raises(RecordError, match="not a finite number"):
        from_json(float, number, "price")


def test_a_long_value_is_shown_in_part():
    with pytest.raises(RecordError) as caught:
        from_json(int, "x" * 10_000, "count")
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"1 2", "Extra data"),
        (b"\xff", "can't decode byte"),
        (b"\xef\xbb\xbf1", "BOM"),
        (b"NaN", "NaN is not a JSON number"),
        (b'{"price": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "an object names a key twice"),
        (b"[" * 100_000 + b"]" * 100_000, "recursion"),
        (b'{"a":' * 100_000, "recursion"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b'{"\\udc00": 1}', "surrogates not allowed"),
    ],
    ids=range(12),
)
def test_text_that_is_not_strict_json_is_refused(text, problem):
    with pytest.raises(RecordError, match=f"file is not JSON that exitify reads: .*{problem}"):
        loads(text, "file")


def test_a_number_of_thousands_of_digits_is_refused_where_it_stands():
    with pytest.raises(RecordError, match=r"is not JSON that exitify reads|not an integer"):
        from_json(int, loads(b"1" * 5000, "file"), "file")


def test_a_number_too_large_for_a_double_is_refused_where_it_stands():
    with pytest.raises(RecordError, match="price is inf, not a finite number"):
        from_json(float, loads(b"1e999", "file"), "price")


def test_nesting_at_any_depth_is_refused_as_a_record_error():
    for depth in range(900, 1020):  # around Python's limit, where reading may still work and showing no longer does
        with pytest.raises(RecordError):
            from_json(int, loads(b"[" * depth + b"]" * depth, "file"), "file")


def test_characters_written_as_escapes_are_read():
    assert loads(b'"\\u00e4 \\ud83d\\ude00"', "file") == "ä 😀"


def test_values_that_json_has_not_are_not_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps(Page(math.nan, ""))  # type: ignore[arg-type]
