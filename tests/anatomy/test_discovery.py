"""Reading a model leaves it as it was, and works wherever its tensors are."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import graftune.anatomy
from graftune.anatomy import Anatomy, anatomy
from graftune.errors import AnatomyError
from tests.families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_model_is_not_changed(name: str) -> None:
    model = FAMILIES[name].build().train()
    before = snapshot(model)
    state = torch.get_rng_state()
    anatomy(model)
    assert torch.equal(torch.get_rng_state(), state)
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(before[key] == after[key] for key in before)
    fresh = FAMILIES[name].build().state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in model.state_dict().items())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Returns what could be touched: modes, hooks, attributes, tensors' identity and gradients."""
    return {
        path: (
            id(module),
            module.training,
            sorted(module.__dict__),
            [len(value) for key, value in module.__dict__.items() if key.endswith("hooks")],
            [(n, id(p), p.requires_grad) for n, p in module.named_parameters(recurse=False)],
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_meta_model_has_the_same_anatomy(name: str) -> None:
    assert anatomy(FAMILIES[name].build()) == anatomy(FAMILIES[name].build(meta=True))


def test_anatomy_survives_copies_of_the_model_and_pickling() -> None:
    model = FAMILIES["bert"].build()
    found = anatomy(model)
    assert anatomy(copy.deepcopy(model)) == found
    assert pickle.loads(pickle.dumps(found)) == found


class ForeignLinear(nn.Module):
    """Like a quantiser's linear: features, but no weight matrix of that shape."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = nn.Parameter(torch.zeros(linear.weight.numel() // 2), requires_grad=False)


def test_quantised_linears_are_linears() -> None:
    model = FAMILIES["phi3"].build()
    expected = anatomy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            model.set_submodule(path, ForeignLinear(module))
    assert anatomy(model).stacks == expected.stacks


def test_adapters_below_their_hosts_are_not_part_of_the_model() -> None:
    model = FAMILIES["mixtral"].build()
    expected = anatomy(model)
    for module in list(model.modules()):
        if hasattr(module, "in_features") or "Norm" in type(module).__name__:
            module.deltas = nn.ModuleDict({"a": nn.Linear(2, 2), "q_proj": nn.LayerNorm(2)})
    model.model.layers[0].mlp.experts.deltas = nn.ModuleDict({"a": nn.Linear(2, 2)})
    assert anatomy(model) == expected


def test_package_can_be_called() -> None:
    model = FAMILIES["bert"].build(meta=True)
    assert graftune.anatomy(model) == anatomy(model)


def test_importing_the_package_does_not_import_transformers() -> None:
    code = (
        "import sys, graftune.anatomy; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(AnatomyError, match="not Linear"):
        anatomy(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_given_anatomy_is_returned() -> None:
    model = FAMILIES["llama"].build(meta=True)
    given = replace(anatomy(model), model_type="mine")
    assert anatomy(model, given) is given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_embeddings": ("model.embed_token",)}, 'Did you mean "model.embed_tokens"'),
        ({"norms": ("model.norms",)}, 'a norm "model.norms".*Did you mean "model.norm"'),
        ({"new_heads": ("classifier",)}, 'a head "classifier"'),
        ({"biases": ("lm_head.bias",)}, 'a tensor "lm_head.bias"'),
    ],
)
def test_given_anatomy_with_a_wrong_path_is_refused(change: dict[str, Any], message: str) -> None:
    model = FAMILIES["llama"].build(meta=True)
    with pytest.raises(AnatomyError, match=message):
        anatomy(model, replace(anatomy(model), **change))


def test_what_is_missing_is_said() -> None:
    import transformers

    config = transformers.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=64)
    found = anatomy(transformers.XLNetLMHeadModel(config))
    assert len(found.missing) == 2
    assert "rel_attn (XLNetRelativeAttention): no query, key and value" in found.missing[0]
    assert "not found:" in str(found)


def test_block_without_attention_is_whole() -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2)
    found = anatomy(transformers.MambaForCausalLM(config))
    assert found.missing == ()
    assert [block.spans for block in found.blocks] == [(), ()]
    assert "no attention in block" in str(found)


def test_every_printed_anatomy_names_all_its_roles() -> None:
    for family in FAMILIES.values():
        found = anatomy(family.build(meta=True))
        text = str(found)
        assert len(text.splitlines()) < 30
        for span in found.blocks[-1].spans:
            assert all(projection.role in text for projection in span.projections)


def test_heads_left_new_by_loading_are_found(tmp_path: Any) -> None:
    import transformers

    model = FAMILIES["bert"].build()
    model.save_pretrained(tmp_path)
    tensors = {k: v for k, v in model.state_dict().items() if "pooler" not in k}
    model.save_pretrained(tmp_path, state_dict=tensors)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert anatomy(loaded).new_heads == ("classifier", "bert.pooler.dense")
    whole: Anatomy = anatomy(FAMILIES["bert"].build())
    assert whole.new_heads == ("classifier",)


def test_saving_and_loading_a_base_does_not_change_its_heads(tmp_path: Any) -> None:
    for name in ("distilbert", "gpt2", "llama", "vit"):
        model = FAMILIES[name].build("classification")
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name)
        assert anatomy(loaded) == anatomy(model)
