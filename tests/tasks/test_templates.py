import pytest

from graftune.errors import SettingsError
from graftune.tasks.templates import Segment, Template


def test_a_template_is_read_into_its_pieces() -> None:
    found = Template.of("{text} {soft:3} It was {mask}.")
    assert found.segments == (
        Segment("text", "text"),
        Segment("hard", " "),
        Segment("soft", length=3),
        Segment("hard", " It was "),
        Segment("mask"),
        Segment("hard", "."),
    )
    assert found.soft_tokens == 3
    assert found.texts == ("text",)
    assert found.has("mask")
    assert not found.has("label")


def test_braces_that_are_meant_are_written_twice() -> None:
    assert Template.of("{{{text}}} is {label}").filled({"text": "x"}, "y") == "{x} is y"


def test_a_marker_stands_for_each_virtual_token() -> None:
    found = Template.of("{soft:1}{text}{soft:2} It was {mask}.")
    assert found.filled({"text": "x"}, "[MASK]", "[u1]") == "[u1]x[u1][u1] It was [MASK]."
    assert found.filled({"text": "x"}, "fine") == "x It was fine."


def test_it_is_parted_where_the_answer_comes() -> None:
    before, after = Template.of("{text} is {label}, I say").parted()
    assert (before.filled({"text": "x"}), after.filled({})) == ("x is ", ", I say")
    whole, nothing = Template.of("{text}?").parted()
    assert (whole.filled({"text": "x"}), nothing.segments) == ("x?", ())


def test_slots_are_called_by_their_roles_or_columns() -> None:
    columns = {"text": "premise", "text_pair": "hypothesis", "label": "gold"}
    found = Template.of("{premise}|{text_pair}|{hypothesis}").bound(columns)
    assert found.texts == ("text", "text_pair")
    assert found.filled({"text": "a", "text_pair": "b"}) == "a|b|b"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("It was {label}.", r"no slot for a text: write \{text\}"),
        ("{text} {label} {mask}", r"2 places for the answer \(\{label\}, \{mask\}\)"),
        ("{text} {soft}", r"needs a number of virtual tokens, as \{soft:3\}"),
        ("{text} {soft:0}", "needs a number"),
        ("{text} {}", r"\{\} is no slot"),
        ("{text!r}", r"\{text!r\} is no slot"),
        ("{text:>4}", r"\{text:>4\} is no slot"),
        ("{text} }", "written twice"),
        ("{text", "written twice"),
    ],
)
def test_what_is_no_template_is_told(text: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        Template.of(text)


def test_an_unknown_slot_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r'\{sentense\} is no text .* Did you mean "sentence"'):
        Template.of("{sentense} {label}").bound({"text": "sentence", "label": "label"})
    with pytest.raises(SettingsError, match=r"\{label_\} is no text of the data, which has"):
        Template.of("{text} {label_}").bound({"text": "text", "label": "label_"})
