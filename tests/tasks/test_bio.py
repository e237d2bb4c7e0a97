import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftune.errors import DataError
from graftune.tasks.bio import (
    OUTSIDE,
    consistent,
    entities,
    entity_scores,
    tag_names,
    type_of,
)

TAGS = st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"]), min_size=1, max_size=9)


def spans(tags: list[str]) -> set[tuple[int, int, str]]:
    """Entities, found the other way round: each word's entity is that of the nearest beginning."""
    starts = [
        at
        for at, tag in enumerate(tags)
        if tag != "O" and (tag[0] == "B" or at == 0 or tags[at - 1][2:] != tag[2:])
    ]
    ends = [
        next((n for n in range(at + 1, len(tags)) if tags[n] != f"I-{tags[at][2:]}"), len(tags))
        for at in starts
    ]
    return {(at, end, tags[at][2:]) for at, end in zip(starts, ends, strict=True)}


@given(TAGS)
def test_entities_are_runs_that_begin_with_b_or_another_type(tags: list[str]) -> None:
    assert {(one.start, one.end, one.type) for one in entities(tags)} == spans(tags)


@given(TAGS)
def test_consistent_tags_mark_the_same_entities_and_stay(tags: list[str]) -> None:
    made, begun = consistent(tags)
    assert entities(made) == entities(tags)
    assert consistent(made) == (made, 0)
    assert begun == sum(
        tag[0] == "I" and new[0] == "B" for tag, new in zip(tags, made, strict=True)
    )


@given(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=4))
def test_scores_count_entities_with_both_ends_and_the_type_right(
    pairs: list[tuple[list[str], list[str]]],
) -> None:
    said = [one[: min(map(len, pair))] for pair in pairs for one in pair[:1]]
    true = [one[: min(map(len, pair))] for pair in pairs for one in pair[1:]]
    hits = sum(len(spans(a) & spans(b)) for a, b in zip(said, true, strict=True))
    found, right = (sum(len(spans(row)) for row in rows) for rows in (said, true))
    scores, by_type = entity_scores(said, true)
    assert scores["precision"] == pytest.approx(hits / found if found else 0)
    assert scores["recall"] == pytest.approx(hits / right if right else 0)
    assert scores["f1"] == pytest.approx(2 * hits / (found + right) if hits else 0)
    assert sum(one["support"] for one in by_type) == right


def test_the_published_example_of_conlleval_gives_one_half() -> None:
    true = ["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"]
    said = ["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"]
    person = ["B-PER", "I-PER", "O"]
    scores, by_type = entity_scores([said, person], [true, person])
    assert scores == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert [(one["label"], one["f1"], one["support"]) for one in by_type] == [
        ("MISC", 0.0, 1),
        ("PER", 1.0, 1),
    ]


def test_tags_are_numbered_by_type() -> None:
    assert tag_names(["a", "b"]) == [OUTSIDE, "B-a", "I-a", "B-b", "I-b"]


@pytest.mark.parametrize("tag", ["S-a", "E-a", "L-a", "B-", "b-a", "PER", ""])
def test_other_schemes_are_refused_and_said_how_to_mend(tag: str) -> None:
    with pytest.raises(DataError, match=r"expected O, B-TYPE or I-TYPE .*write S- as B-"):
        type_of(tag)
