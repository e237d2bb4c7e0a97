"""Plans beside the figures that HF PEFT's README publishes."""

from __future__ import annotations

import pytest

from benchmarks.plan_published import GB, MEMORY, PARAMETERS, PUBLISHED, reproduced

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("model", "how"), PUBLISHED)
def test_a_published_figure_is_reproduced_within_a_fifth(model: str, how: str) -> None:
    found = reproduced(model, how)
    assert found.parameters == PARAMETERS[model]
    if found.published is None:
        assert found.planned > MEMORY / GB
    else:
        assert found.planned == pytest.approx(found.published, rel=0.2)
