"""Which adapters act together: what a composition may be, and the names in it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import graftune as gt
from graftune.composition import check_names, members_of
from graftune.errors import AdapterError

names = st.text("abc", min_size=1, max_size=2)
stacks = st.lists(names, min_size=1, max_size=3, unique=True).map(lambda n: gt.Stack(*n))
members = st.lists(st.none() | names | stacks, min_size=1, max_size=6)


def test_a_stack_keeps_its_order() -> None:
    assert gt.Stack("b", "a").names == ("b", "a")
    assert gt.Stack("b", "a") == gt.Stack("b", "a")
    assert gt.Stack("b", "a") != gt.Stack("a", "b")
    assert len({gt.Stack("a"), gt.Stack("a")}) == 1


@pytest.mark.parametrize(
    ("given_names", "message"),
    [
        ((), r"Stack needs one or more different members, found \[\]"),
        (("a", "a"), r"Stack needs one or more different members, found \['a', 'a'\]"),
        ((["a", "b"],), r"Stack takes names, Average, Fuse, Parallel; found \['a', 'b'\]"),
        (("a", None), "Stack takes names, Average, Fuse, Parallel; found None"),
    ],
)
def test_a_stack_of_anything_else_is_refused(given_names: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        gt.Stack(*given_names)


@pytest.mark.parametrize(
    ("given_members", "message"),
    [
        ([], "Rows needs one member per row of the batch, found none"),
        (["a", 3], "Rows takes names, Stack, Average, Fuse or None, found 3"),
        ([["a"]], r"Rows takes names, Stack, Average, Fuse or None, found \['a'\]"),
        ([gt.Rows(["a"])], "Rows takes names, Stack, Average, Fuse or None, found Rows"),
    ],
)
def test_rows_of_anything_else_are_refused(given_members: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        gt.Rows(given_members)


@pytest.mark.parametrize("wrong", [3, ["a"], ("a",), {"a"}, b"a"])
def test_what_is_no_composition_is_refused(wrong: Any) -> None:
    with pytest.raises(AdapterError, match="A composition is a name, None") as error:
        members_of(wrong)
    assert repr(wrong) in str(error.value)


@given(members)
def test_rows_name_each_adapter_once_in_order(given_members: list[Any]) -> None:
    rows = gt.Rows(iter(given_members))
    assert len(rows.members) == len(given_members)
    every = [name for member in given_members for name in members_of(member)]
    assert members_of(rows) == rows.names == tuple(dict.fromkeys(every))


@given(members, st.lists(names, unique=True))
def test_names_are_known_or_the_first_that_is_not_is_named(
    given_members: list[Any], known: list[str]
) -> None:
    rows = gt.Rows(given_members)
    unknown = [name for name in rows.names if name not in known]
    if not unknown:
        check_names(rows, known)
        return
    with pytest.raises(AdapterError) as error:
        check_names(rows, known)
    assert f'No adapter is named "{unknown[0]}"; attached: ' in str(error.value)
    assert all(f'"{name}"' in str(error.value) for name in known)


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(AdapterError, match=r'named "intnets"; .* Did you mean "intents"\?'):
        check_names("intnets", ["spam", "intents"])
    with pytest.raises(AdapterError, match=r"attached: none\.$"):
        check_names("intents", [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gt.Average("a"), "Average needs two or more different members"),
        (lambda: gt.Average("a", "a"), "Average needs two or more different members"),
        (lambda: gt.Average("a", "b", weights=[1.0]), "2 members and 1 weights: give one for each"),
        (lambda: gt.Average("a", "b", weights=[1.0, float("inf")]), "takes finite numbers"),
        (lambda: gt.Average("a", gt.Parallel("b", "c")), "Average takes names, Stack, Fuse; found"),
        (lambda: gt.Fuse("a"), "Fuse needs two or more different members"),
        (lambda: gt.Fuse("a", gt.Average("b", "c")), "Fuse takes names, Stack; found"),
        (
            lambda: gt.Fuse("a", gt.Stack("b", gt.Average("c", "d"))),
            "Fuse takes names or Stacks of names",
        ),
        (lambda: gt.Parallel("a"), "Parallel needs two or more different members"),
        (lambda: gt.Parallel("a", gt.Parallel("b", "c")), "Parallel takes names, Stack, Average"),
        (lambda: gt.Parallel("a", gt.Rows(["b"])), "Parallel takes names, Stack, Average"),
        (
            lambda: gt.Stack(gt.Parallel("a", "b"), "c"),
            "Parallel can only be the last member of a Stack",
        ),
        (lambda: gt.Stack("a", gt.Stack("b")), "Stack takes names, Average, Fuse, Parallel"),
        (lambda: gt.Rows(["a", gt.Parallel("b", "c")]), "Rows takes names, Stack, Average, Fuse"),
        (
            lambda: gt.Rows([gt.Stack("a", gt.Parallel("b", "c"))]),
            "Rows can't hold a Parallel",
        ),
    ],
)
def test_a_nesting_without_a_meaning_is_refused(make: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make()


@given(stacks, st.lists(st.floats(-2, 2), min_size=2, max_size=2))
def test_names_are_those_of_all_members_once(stack: gt.Stack, weights: list[float]) -> None:
    average = gt.Average("x", stack, weights=weights)
    assert set(average.names) == {"x", *stack.names}
    assert gt.Parallel(average, None).names == average.names
    assert gt.Rows([average, None, average]).names == average.names
    assert average == gt.Average("x", stack, weights=weights)
    assert hash(average) == hash(gt.Average("x", stack, weights=weights))
