import pytest

from graftune.errors import DataError
from graftune.tasks.columns import check_columns, find_column
from graftune.tasks.tables import Table

TABLE = Table([{"Text": "a", "intnet": "x"}], "mail.csv", [2])


def test_usual_names_are_found_in_any_case() -> None:
    assert find_column(TABLE, "text", None, ("sentence", "text")) == "Text"


def test_a_missing_column_is_told_with_what_was_found_and_the_nearest() -> None:
    with pytest.raises(DataError) as caught:
        find_column(TABLE, "label", None, ("label", "intent"))
    assert str(caught.value) == (
        'mail.csv has no label column: found "Text", "intnet", looked for label, intent; name it '
        'with data.columns.label. Did you mean "intnet"?'
    )


def test_a_wrongly_named_column_is_told_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r'no column "intent".*Did you mean "intnet"'):
        find_column(TABLE, "label", "intent", ())


def test_an_optional_column_may_be_missing() -> None:
    assert find_column(TABLE, "text_pair", None, ("other",), required=False) is None


def test_other_splits_need_the_training_datas_columns() -> None:
    with pytest.raises(DataError, match='no column "label", which is the label of the training'):
        check_columns(TABLE, {"text": "Text", "label": "label"})
