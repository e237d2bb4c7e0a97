"""The worked example of CONTRIBUTING.md is a whole method in one file, and works everywhere."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import graftune as gt
from tests.families import FAMILIES
from tests.project.pages import ROOT, blocks

PAGE = ROOT / "CONTRIBUTING.md"
NAME = "gain_in_a_file"


@pytest.fixture(scope="module")
def gain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type]:
    """The example's class, from a file that holds the page's block and nothing else."""
    from graftune.methods import base

    file: Path = tmp_path_factory.mktemp("method") / "gain.py"
    (block,) = blocks(PAGE, "python")
    file.write_text(block.text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    yield module.GainTuning
    del base._registry["GainTuning"], sys.modules[NAME]


def test_the_page_is_one_screen_and_the_file_short(gain: type) -> None:
    (block,) = blocks(PAGE, "python")
    assert len(block.text.splitlines()) <= 64
    assert len(PAGE.read_text("utf-8").splitlines()) <= 100


def test_it_is_found_by_its_name_and_documents_its_settings(gain: type) -> None:
    from graftune.methods import methods

    assert methods()["GainTuning"] is gain
    assert {setting.name: bool(setting.doc) for setting in gain.settings()}["targets"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gpt_neox", "t5"])
def test_it_starts_as_the_base_learns_and_goes_without_a_trace(gain: type, family: str) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    with torch.no_grad():
        base = model(**inputs).logits
        adapter = gt.attach(model, gain(), name="gain")
        assert torch.equal(model(**inputs).logits, base)
        for parameter in adapter.parameters():
            parameter.add_(0.1)
        assert not torch.allclose(model(**inputs).logits, base)
        gt.activate(model, None)
        assert torch.equal(model(**inputs).logits, base)
    gt.activate(model, "gain")
    model(**inputs).logits.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert {id(p) for p in trained} == {id(p) for p in adapter.parameters()}
    gt.activate(model, None)
    gt.detach(model, "gain")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_it_merges_and_unmerges(gain: type, family: str) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    with torch.no_grad():
        adapter = gt.attach(model, gain(), name="gain")
        for parameter in adapter.parameters():
            parameter.add_(0.1)
        beside = model(**inputs).logits
        gt.merge(model, "gain")
        torch.testing.assert_close(model(**inputs).logits, beside, atol=1e-5, rtol=1e-5)
        gt.unmerge(model)
        assert torch.equal(model(**inputs).logits, beside)


def test_it_is_saved_and_loaded_like_any_other(gain: type, tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    model, inputs = family.build(), family.inputs()
    adapter = gt.attach(model, gain(targets="qv"), name="gain")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
        expected = model(**inputs).logits
        fresh = family.build()
        gt.load(fresh, adapter.save(tmp_path / "gain"))
        assert torch.equal(fresh(**inputs).logits, expected)


PACKAGE = """
import graftune as gt

class Elsewhere(gt.BitFit):
    name = "Elsewhere"
    summary = "Another package's."
"""

USES_IT = """
import graftune as gt
from graftune.methods.base import Method
from tests.families import FAMILIES

assert "Elsewhere" in gt.methods(), list(gt.methods())
model = FAMILIES["bert"].build()
adapter = gt.attach(model, Method.from_dict({"method": "elsewhere"}))
fresh = FAMILIES["bert"].build()
loaded = gt.load(fresh, adapter.save("adapter"))
assert type(loaded.method).__module__ == "some_package", type(loaded.method)
"""


@pytest.mark.parametrize("first", ["", "import some_package\n"], ids=["graftune", "package"])
def test_another_package_gives_a_method_by_an_entry_point(tmp_path: Path, first: str) -> None:
    """As installed by pip: a module and a .dist-info folder on the path."""
    (tmp_path / "some_package.py").write_text(PACKAGE, encoding="utf-8")
    info = tmp_path / "some_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[graftune.methods]\nelse = some_package:Elsewhere\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", first + USES_IT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
