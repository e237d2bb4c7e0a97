"""The papers' numbers of trained parameters, on the real sizes of models on the meta device.

Each is checked twice: the method's formula, and the tensors of the adapter that is attached.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from graftune.methods.base import Method

LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
T5 = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
T0 = {
    "d_model": 2048,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT-base": ("Bert", {}),
    "BERT-large": ("Bert", LARGE),
    "RoBERTa-base": ("Roberta", ROBERTA),
    "RoBERTa-large": ("Roberta", {**ROBERTA, **LARGE}),
    "GPT-2": ("GPT2", {}),
    "LLaMA-7B": ("Llama", {}),
    "T5-base": ("T5", T5),
    "T0-3B": ("T5", T0),
    "ViT-B/16": ("ViT", {}),
    "BART-large": ("Bart", {}),
}
CLASSES = {"GPT2": "LMHeadModel", "Llama": "ForCausalLM", "T5": "ForConditionalGeneration"}

TOTALS = {
    "BERT-base": 109_482_240,
    "BERT-large": 335_141_888,
    "RoBERTa-base": 124_645_632,
    "GPT-2": 124_439_808,
    "LLaMA-7B": 6_738_415_616,
    "T5-base": 222_903_552,
    "ViT-B/16": 86_389_248,
}
COUNTS: list[tuple[str, Method, int]] = [
    ("BERT-base", gt.LoRA(targets="qv"), 294_912),
    ("RoBERTa-large", gt.LoRA(targets="qv"), 786_432),
    ("ViT-B/16", gt.LoRA(targets="qv", r=16), 589_824),
    ("T5-base", gt.LoRA(targets="qv"), 884_736),
    ("T0-3B", gt.LoRA(targets="qv"), 4_718_592),
    ("LLaMA-7B", gt.LoRA(targets="qv"), 4_194_304),
    ("LLaMA-7B", gt.LoRA(targets="qv", r=64), 33_554_432),
    ("LLaMA-7B", gt.LoRA(targets="attention"), 8_388_608),
    ("LLaMA-7B", gt.LoRA(), 19_988_480),
    ("LLaMA-7B", gt.LoRA(targets="all-linear", r=64), 159_907_840),
    ("BERT-base", gt.AdaLoRA(), 1_991_520),
    ("BERT-base", gt.AdaLoRA(r=8), 1_327_680),
    ("BERT-base", gt.AdaLoRA(r=2, target_r=2), 331_920),
    ("BERT-base", gt.AdaLoRA(targets="qv"), 24 * 12 * (768 + 768 + 1)),
    ("LLaMA-7B", gt.AdaLoRA(), 29_985_408),
    ("T5-base", gt.AdaLoRA(), 4_868_352),
    ("ViT-B/16", gt.AdaLoRA(), 1_991_520),
    ("BERT-base", gt.LoHa(targets="qv"), 589_824),
    ("LLaMA-7B", gt.LoHa(targets="qv"), 8_388_608),
    ("LLaMA-7B", gt.LoHa(), 2 * 19_988_480),
    ("BERT-base", gt.LoKr(targets="qv"), 26_112),
    ("LLaMA-7B", gt.LoKr(targets="qv"), 327_680),
    ("T5-base", gt.LoKr(targets="qv"), 72 * 1_088),
    ("BERT-base", gt.VeRA(targets="qv", save_projection=False), 24 * (256 + 768)),
    ("RoBERTa-base", gt.VeRA(targets="qv", r=1024, save_projection=False), 43_008),
    ("RoBERTa-large", gt.VeRA(targets="qv", save_projection=False), 61_440),
    ("LLaMA-7B", gt.VeRA(save_projection=False), 1_417_216),
    ("BERT-base", gt.PromptTuning(length=20), 15_360),
    ("T5-base", gt.PromptTuning(length=100), 76_800),
    ("LLaMA-7B", gt.PromptTuning(length=20), 81_920),
    ("BERT-base", gt.MultitaskPromptTuning(length=100), 77_668),
    ("T5-base", gt.MultitaskPromptTuning(length=100), 77_668),
    ("T5-base", gt.MultitaskPromptTuning(length=100, tasks=6, r=2), 76_800 + 6 * 2 * 868),
    ("LLaMA-7B", gt.MultitaskPromptTuning(length=100), 413_796),
    ("BERT-base", gt.PTuning(), 6_912 + 7_090_176 + 1_181_184),
    ("BERT-base", gt.PTuning(encoder="mlp"), 6_912 + 1_181_184),
    ("BERT-base", gt.PTuning(encoder="mlp", depth=3), 6_912 + 3 * 590_592),
    ("BERT-base", gt.PTuning(encoder="none"), 6_912),
    ("LLaMA-7B", gt.PTuning(), 9 * 4096 + 201_392_128 + 33_562_624),
    ("T5-base", gt.PTuning(), 6_912 + 7_090_176 + 1_181_184),
    ("BERT-base", gt.BitFit(), 102_912),
    ("BERT-large", gt.BitFit(), 272_384),
    ("RoBERTa-base", gt.BitFit(), 102_912),
    ("GPT-2", gt.BitFit(), 102_144),
    ("ViT-B/16", gt.BitFit(), 103_680),
    ("BART-large", gt.BitFit(), 333_824),
    ("BERT-base", gt.BitFit(subset="query+intermediate"), 46_080),
    ("BERT-large", gt.BitFit(subset="query+intermediate"), 122_880),
    ("BERT-base", gt.IA3(), 55_296),
    ("LLaMA-7B", gt.IA3(), 614_400),
    ("T0-3B", gt.IA3(), 540_672),
    ("T5-base", gt.IA3(), 12 * (768 + 768 + 3072) + 12 * (4 * 768 + 3072)),
    ("ViT-B/16", gt.IA3(), 55_296),
    ("BERT-base", gt.Selective(), 28_348_416),
    ("BERT-base", gt.Selective(exclude="biases"), 12 * 4 * 768 * 768),
    ("T5-base", gt.Selective(), 84_935_424),
    ("T5-base", gt.Selective(exclude="relative_attention_bias"), 36 * 4 * 768 * 768),
    ("T5-base", gt.Selective(targets="cross-attention"), 28_311_552),
    ("LLaMA-7B", gt.Selective(), 2_147_483_648),
    ("BERT-base", gt.Selective(targets="ffn"), 56_669_184),
    ("BERT-base", gt.Selective(targets="ffn", exclude="biases"), 12 * 2 * 768 * 3072),
    ("T5-base", gt.Selective(targets="ffn"), 113_246_208),
    ("LLaMA-7B", gt.Selective(targets="ffn"), 4_328_521_728),
    ("BERT-base", gt.Selective(targets="blocks", layers=-1), 7_087_872),
    ("BERT-base", gt.Selective(targets="norms"), 38_400),
    ("BERT-base", gt.Selective(targets="biases"), 102_912),
    ("GPT-2", gt.Selective(targets="embeddings"), (50_257 + 1_024) * 768),
    ("LLaMA-7B", gt.Selective(targets="head"), 32_000 * 4_096),
    *((name, gt.Selective(targets="all"), total) for name, total in TOTALS.items()),
    ("BERT-base", gt.LayerNormTuning(), 38_400),
    ("BERT-base", gt.LayerNormTuning(which="weight"), 19_200),
    ("BERT-base", gt.LayerNormTuning(layers=-1), 3_072),
    ("BERT-large", gt.LayerNormTuning(), 100_352),
    ("GPT-2", gt.LayerNormTuning(), 38_400),
    ("T5-base", gt.LayerNormTuning(), 47_616),
    ("LLaMA-7B", gt.LayerNormTuning(), 266_240),
    ("ViT-B/16", gt.LayerNormTuning(), 38_400),
    *((name, gt.FullFineTuning(), total) for name, total in TOTALS.items()),
    ("BERT-base", gt.FishMask(), 547_411),
    ("BERT-large", gt.FishMask(), 1_675_709),
    ("LLaMA-7B", gt.FishMask(), 33_692_078),
    ("T5-base", gt.FishMask(), 1_114_517),
    ("ViT-B/16", gt.FishMask(), 431_946),
    ("BERT-base", gt.DiffPruning(structured=False), 2 * TOTALS["BERT-base"]),
    ("BERT-large", gt.DiffPruning(), 2 * 335_141_888 + 391),
    ("LLaMA-7B", gt.DiffPruning(), 2 * TOTALS["LLaMA-7B"] + 291),
    ("BERT-base", gt.FullFineTuning(keep_base=True), TOTALS["BERT-base"]),
    ("BERT-base", gt.HoulsbyAdapter(), 2_379_264 + 38_400),
    ("BERT-base", gt.HoulsbyAdapter(train_norms=False), 2_379_264),
    ("BERT-large", gt.HoulsbyAdapter(), 6_343_680 + 100_352),
    ("LLaMA-7B", gt.HoulsbyAdapter(train_norms=False), 64 * 528_448),
    ("T5-base", gt.HoulsbyAdapter(train_norms=False), 48 * 99_136),
    ("ViT-B/16", gt.HoulsbyAdapter(train_norms=False), 2_379_264),
    ("BERT-base", gt.PfeifferAdapter(), 894_528),
    ("T5-base", gt.PfeifferAdapter(), 1_789_056),
    ("LLaMA-7B", gt.PfeifferAdapter(), 67_248_128),
    ("ViT-B/16", gt.PfeifferAdapter(), 894_528),
    ("BERT-base", gt.PfeifferAdapter(layers="5:"), 521_808),
    ("BERT-base", gt.PfeifferAdapter(invertible=True), 894_528 + 296_064),
    ("LLaMA-7B", gt.PfeifferAdapter(invertible=True), 67_248_128 + 8_394_752),
    ("BART-large", gt.ParallelAdapter(bottleneck=512), 25_202_688),
    ("BERT-base", gt.ParallelAdapter(bottleneck=48), 894_528),
    ("ViT-B/16", gt.AdapterPlus(), 165_984),
    ("ViT-B/16", gt.AdapterPlus(bottleneck=16), 313_536),
    ("T5-base", gt.Compacter(), 161_728),
    ("T5-base", gt.CompacterPlusPlus(), 104_704),
    ("BERT-base", gt.Compacter(train_norms=False), 24 * 2_376 + 64),
    ("LLaMA-7B", gt.CompacterPlusPlus(), 32 * (2 * 4_096 + 2 * 128 + 4_096 + 128) + 64 + 266_240),
    ("BERT-base", gt.PrefixTuning(length=10, hidden=None), 184_320),
    ("BERT-base", gt.PrefixTuning(length=10), 7_680 + 393_728 + 9_455_616),
    ("BART-large", gt.PrefixTuning(length=200, hidden=None), 14_745_600),
    ("BART-large", gt.PrefixTuning(length=30, hidden=None), 2_211_840),
    ("LLaMA-7B", gt.PrefixTuning(hidden=None), 5_242_880),
    ("T5-base", gt.PrefixTuning(hidden=None, sublayers=("attention",)), 737_280),
    ("T5-base", gt.PrefixTuning(hidden=None), 1_105_920),
    ("BERT-base", gt.UniPELT(hidden=None), 1_410_672),
    ("BERT-base", gt.UniPELT(hidden=None, gate=None), 1_373_760),
    (
        "BERT-base",
        gt.UniPELT(hidden=None, gate=None, submodules=("prefix", "adapter")),
        1_078_848,
    ),
    ("BERT-base", gt.UniPELT(), 1_410_672 - 184_320 + 9_857_024),
    ("RoBERTa-base", gt.LoReFT(r=1, prefix_positions=1), 18_444),
    ("RoBERTa-large", gt.LoReFT(r=1, prefix_positions=1), 49_176),
    ("LLaMA-7B", gt.LoReFT(r=8, prefix_positions=7, suffix_positions=7, tied=True), 2_097_408),
    ("LLaMA-7B", gt.LoReFT(suffix_positions=5, layers=[3, 9, 18, 24]), 262_176),
    ("BERT-base", gt.LoReFT(), 73_776),
    ("LLaMA-7B", gt.DiReFT(), 1_048_704),
    ("T5-base", gt.NoReFT(), 147_552),
    ("ViT-B/16", gt.LoReFT(), 73_776),
    ("BART-large", gt.MAM(hidden=None, bottleneck=512), 27_414_528),
    ("BERT-base", gt.MAM(hidden=None, bottleneck=48), 1_447_488),
    ("BERT-base", gt.UnifiedAdapter(location="head", k=30), 12 * 2 * 30 * 768),
    ("LLaMA-7B", gt.UnifiedAdapter(location="head", k=10), 32 * 2 * 10 * 4096),
    (
        "BERT-base",
        gt.UnifiedAdapter(location="matrix", insertion="sequential", k=8, targets="qv"),
        294_912,
    ),
    ("BERT-base", gt.Union(methods=(gt.LoRA(targets="qv"), gt.PfeifferAdapter())), 1_189_440),
    ("T5-base", gt.PrefixTuning(), 3 * (15_360 + 393_728) + 513 * 36 * 2 * 768),
    ("BERT-large", gt.PTuningV2(length=40), 1_966_080),
    ("BERT-base", gt.PTuningV2(), 368_640),
    ("ViT-B/16", gt.PTuningV2(), 368_640),
    ("LLaMA-7B", gt.LLaMAAdapter(gate="layer"), 1_228_800 + 30),
    ("LLaMA-7B", gt.LLaMAAdapter(), 1_228_800 + 30 * 32),
    ("LLaMA-7B", gt.LLaMAAdapter(layers="-30:"), 1_228_800 + 30 * 32),
    ("BERT-base", gt.LLaMAAdapter(), 10 * (10 * 768 + 12)),
    ("T5-base", gt.LLaMAAdapter(), 2 * 10 * (10 * 768 + 12)),
    ("ViT-B/16", gt.LLaMAAdapter(), 10 * (10 * 768 + 12)),
    ("BERT-base", gt.ParallelAdapter(scale="learned"), 12 * (2 * 768 * 384 + 768 + 384 + 1)),
]


@functools.cache
def model_of(name: str) -> nn.Module:
    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**settings)
    with torch.device("meta"):
        return getattr(transformers, kind + CLASSES.get(kind, "Model"))(config)


@pytest.mark.parametrize(("name", "method", "expected"), COUNTS)
def test_formula_and_tensors_are_the_papers_number(
    name: str, method: Method, expected: int
) -> None:
    model = model_of(name)
    assert method.count(model, gt.anatomy(model)) == expected
    adapter = gt.attach(model, method)
    try:
        assert adapter.count() == expected
        assert all(tensor.is_meta for tensor in adapter.parameters())
        summary = gt.summary(model)
        assert summary.trainable == expected
        assert summary.base == TOTALS.get(name, summary.base)
        kept = [t for _, t in adapter.named_tensors() if not isinstance(t, nn.Parameter)]
        assert summary.bytes == 4 * expected + sum(tensor.nbytes for tensor in kept)
    finally:
        take_off(model, name)


@pytest.mark.parametrize("name", ["T5-base", "LLaMA-7B"])
def test_a_model_without_biases_has_none_to_train(name: str) -> None:
    model = model_of(name)
    parts = gt.anatomy(model)
    assert gt.BitFit().count(model, parts) == 0
    with pytest.raises(SettingsError, match=r"has no biases outside its head.*add_missing=True"):
        gt.attach(model, gt.BitFit())
    assert gt.adapters(model) == {}


def test_missing_biases_are_one_for_each_output_of_the_blocks() -> None:
    model = model_of("LLaMA-7B")
    widths = 32 * (4 * 4096 + 2 * 11008 + 4096)
    method = gt.BitFit(add_missing=True)
    assert method.count(model, gt.anatomy(model)) == widths
    assert gt.attach(model, method).count() == widths
    take_off(model, "LLaMA-7B")


@pytest.mark.parametrize(
    ("more", "extra"),
    [
        ({"dora": True}, 24 * 768),
        ({"lora_bias": True}, 24 * 768),
        ({"bias": "lora_only"}, 24 * 768),
        ({"bias": "all"}, 102_912),
        ({"trainable_tokens": (5, 6, 7)}, 3 * 768),
        ({"layers": -1}, -11 * 2 * 8 * 1536),
        ({"rank_pattern": {"query": 2}}, -12 * 6 * 1536),
    ],
)
def test_settings_change_the_count_as_the_formula_says(more: dict[str, Any], extra: int) -> None:
    model = model_of("BERT-base")
    method = gt.LoRA(targets="qv", **more)
    assert method.count(model, gt.anatomy(model)) == 294_912 + extra
    assert gt.attach(model, method).count() == 294_912 + extra
    take_off(model, "BERT-base")


def take_off(model: nn.Module, name: str) -> None:
    """Leaves the cached model plain; one trained in place is built anew."""
    try:
        gt.activate(model, None)
        gt.detach(model, "default")
    except AdapterError:
        model_of.cache_clear()
