import pytest
import torch

from graftune.errors import SettingsError
from graftune.tasks.verbalizer import Verbalizer, only_token


def test_labels_say_their_names_unless_told_otherwise() -> None:
    found = Verbalizer.of(["no", "yes"], {"yes": ["good", "great"]})
    assert found.words == {"no": ("no",), "yes": ("good", "great")}
    assert found.every == ["no", "good", "great"]


@pytest.mark.parametrize(
    ("combine", "second"), [("mean", 2.5), ("sum", 5.0), ("logsumexp", 3.3132617)]
)
def test_a_labels_score_comes_from_its_words(combine: str, second: float) -> None:
    found = Verbalizer.of(["no", "yes"], {"yes": ["good", "great"]}, combine)
    scores = found.scores(torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(scores, torch.tensor([[1.0, second]]))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"yess": "good"}, 'no label; there are no, yes. Did you mean "yes"'),
        ({"yes": []}, 'the label "yes" has no word'),
        ({"yes": " "}, 'the label "yes" has no word'),
        ({"yes": "no"}, '"no" is said for "no" and again for "yes"'),
        ({"yes": ["good", "good"]}, '"good" is said for "yes" and again for "yes"'),
    ],
)
def test_what_cannot_be_said_is_told(words: dict, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        Verbalizer.of(["no", "yes"], words)


def test_a_mask_holds_one_token() -> None:
    assert only_token("good", [7], ["good"]) == 7
    told = r'"awful" is 2 tokens of this model \(aw, ##ful\), but a mask holds one'
    with pytest.raises(SettingsError, match=told):
        only_token("awful", [7, 8], ["aw", "##ful"])
