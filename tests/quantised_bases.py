"""Tiny models in 4 and 8 bit, quantised by transformers when they are loaded."""

from __future__ import annotations

import copy
import functools
import logging
import tempfile

import pytest
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from graftune.sites.quantised import keep_exact
from tests.families import FAMILIES

pytest.importorskip("bitsandbytes", reason="bases in 4 and 8 bit need bitsandbytes")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

SETTINGS = {
    "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "int8": {},
}


def quantised(family: str, scheme: str = "nf4", task: str = "default") -> PreTrainedModel:
    """Returns the caller's own copy of a tiny model, its linears but the head's quantised."""
    return copy.deepcopy(_kept(family, scheme, task))


def plain(family: str, task: str = "default") -> PreTrainedModel:
    """Returns what they are quantised from, 64 wide: see `WIDTH` of graftune.tasks.quantising."""
    return FAMILIES[family].build(task, hidden_size=64, intermediate_size=128)


@functools.cache
def _kept(family: str, scheme: str, task: str) -> PreTrainedModel:
    made = plain(family, task)
    heads = [n for n, _ in made.named_children() if n != made.base_model_prefix]
    asked = BitsAndBytesConfig(
        load_in_4bit=scheme != "int8",
        load_in_8bit=scheme == "int8",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=heads,
        **SETTINGS[scheme],
    )
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        model = type(made).from_pretrained(
            folder, quantization_config=asked, device_map={"": "cpu"}, dtype=torch.float32
        )
    keep_exact(model)
    return model.eval()
