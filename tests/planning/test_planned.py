"""Plans against what the same step does with numbers, counted storage by storage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graftune as gt
from graftune.errors import FormatError, SettingsError, TrainingError
from graftune.methods.base import Method
from graftune.planning import PlanSettings, optimizers, steps
from graftune.planning.batches import batch_of
from graftune.planning.skeletons import base_of, random_model
from graftune.planning.tracking import Ledger
from tests.planning.models import BERT, LLAMA, T5, VIT

SMALL = {"batch_size": 4, "length": 32, "target_length": 8}


def real_rise(config: Any, method: Method, **settings: Any) -> int:
    """Returns the peak of live bytes above the model in a step with numbers."""
    chosen = PlanSettings.of(**settings)
    base = base_of(config, None, chosen.labels)
    model: Any = random_model(base, getattr(torch, chosen.precision))
    adapter = gt.attach(model, method, seed=0)
    adapter.begin(10)
    model.train()
    ledger = Ledger()
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.note(tensor)
    floor = sum(ledger.peak().values())
    with ledger:
        trained = [one for one in model.parameters() if one.requires_grad]
        optimizer = optimizers.Run(trained, chosen)
        batch = batch_of(base, model, chosen)
        if chosen.gradient_checkpointing:
            steps.checkpoint(model)
        with steps.chunked(model, chosen):
            loss = steps.loss_of(model, batch, chosen, "cpu") + adapter.penalty()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return sum(ledger.peak().values()) - floor


CASES = {
    "bert lora": (BERT, gt.LoRA(r=8), {}),
    "bert full adafactor": (BERT, gt.FullFineTuning(), {"optimizer": "adafactor"}),
    "bert prompt": (BERT, gt.PromptTuning(length=5), {}),
    "bert adalora": (BERT, gt.AdaLoRA(), {}),
    "llama houlsby bf16": (LLAMA, gt.HoulsbyAdapter(), {"precision": "bfloat16"}),
    "llama lora checkpointed": (LLAMA, gt.LoRA(), {"gradient_checkpointing": True}),
    "llama loss in pieces": (LLAMA, gt.LoRA(), {"loss_chunk": 16}),
    "llama prefix": (LLAMA, gt.PrefixTuning(length=5), {}),
    "t5 ladder": (T5, gt.LadderSideTuning(reduction=4), {}),
    "vit bitfit sgd": (VIT, gt.BitFit(), {"optimizer": "sgd"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_what_a_step_with_numbers_keeps(case: str) -> None:
    config, method, settings = CASES[case]
    expected = real_rise(config, method, **SMALL, **settings)
    found = gt.plan(config, method, **SMALL, **settings)
    assert found.rise_bytes == pytest.approx(expected, rel=0.03)


def test_the_parts_are_the_peak() -> None:
    found = gt.plan(LLAMA, gt.LoRA(), **SMALL)
    assert sum(found.parts.values()) == found.peak_bytes
    assert found.parts["logits"] >= 4 * 31 * 4000 * 4  # float32 logits of every token
    assert found.parts["adapter"] == found.adapter_disk_bytes
    assert json.loads(json.dumps(found.to_dict()))["peak_bytes"] == found.peak_bytes


def test_adam_keeps_two_values_for_each_trained_one() -> None:
    adam, sgd = (
        gt.plan(BERT, gt.FullFineTuning(), optimizer=name, **SMALL)
        for name in ("adamw_torch", "sgd")
    )
    kept = adam.parts["optimizer"] - sgd.parts["optimizer"]
    assert kept == pytest.approx(8 * adam.trained_parameters, rel=0.01)


def test_eight_bit_states_are_a_quarter_and_paged_ones_the_hosts() -> None:
    given = {**SMALL, "device": "cuda"}
    wide = gt.plan(BERT, gt.FullFineTuning(), optimizer="adamw_torch", **given)
    narrow = gt.plan(BERT, gt.FullFineTuning(), optimizer="adamw_8bit", **given)
    paged = gt.plan(BERT, gt.FullFineTuning(), optimizer="paged_adamw_8bit", **given)
    assert narrow.parts["optimizer"] == pytest.approx(wide.parts["optimizer"] / 4, rel=0.05)
    assert paged.parts["optimizer"] == 0
    assert paged.host_parts["optimizer"] == narrow.parts["optimizer"]


def test_logits_in_pieces_leave_those_of_one_piece() -> None:
    whole = gt.plan(LLAMA, gt.LoRA(), **SMALL)
    pieces = gt.plan(LLAMA, gt.LoRA(), loss_chunk=16, **SMALL)
    assert pieces.parts["logits"] < 0.5 * whole.parts["logits"]
    with pytest.raises(TrainingError, match="has no head of the vocabulary"):
        gt.plan(BERT, gt.LoRA(), loss_chunk=16, **SMALL)


def test_fp4_packs_as_nf4_does() -> None:
    packed = [gt.plan(LLAMA, gt.LoRA(), quantize=kind, **SMALL) for kind in ("nf4", "fp4")]
    assert packed[0].parts["weights"] == packed[1].parts["weights"]


def test_nf4_keeps_about_half_a_byte_of_each_value_of_the_blocks() -> None:
    plain = gt.plan(LLAMA, gt.LoRA(), precision="bfloat16", **SMALL)
    nf4 = gt.plan(LLAMA, gt.LoRA(), precision="bfloat16", quantize="nf4", **SMALL)
    twice = gt.plan(
        LLAMA, gt.LoRA(), precision="bfloat16", quantize="nf4", double_quant=True, **SMALL
    )
    linears = 4 * (256 * 256 * 2 + 2 * 256 * 128 + 3 * 256 * 688)
    assert plain.parts["weights"] - nf4.parts["weights"] == pytest.approx(
        linears * (2 - 0.5 - 4 / 64), rel=0.01
    )
    assert twice.parts["weights"] < nf4.parts["weights"]


def test_quantised_linears_keep_no_wide_weight_for_the_backward_pass() -> None:
    plain = gt.plan(LLAMA, gt.LoRA(), precision="bfloat16", **SMALL)
    nf4 = gt.plan(LLAMA, gt.LoRA(), precision="bfloat16", quantize="nf4", **SMALL)
    assert nf4.parts["activations"] == pytest.approx(plain.parts["activations"], rel=0.05)


def test_offloading_moves_what_it_says_and_nothing_else() -> None:
    given = {**SMALL, "device": "cuda"}
    here = gt.plan(LLAMA, gt.LoRA(), **given)
    there = gt.plan(LLAMA, gt.LoRA(), offload=("activations",), **given)
    assert there.parts["activations"] < 0.2 * here.parts["activations"]
    assert there.host_parts["activations"] > 0
    weights = gt.plan(LLAMA, gt.LoRA(), offload=("parameters",), **given)
    assert weights.parts["weights"] < 0.01 * here.parts["weights"]
    assert weights.host_parts["weights"] == pytest.approx(here.parts["weights"], rel=0.01)
    states = gt.plan(LLAMA, gt.LoRA(), offload=("optimizer",), **given)
    assert states.host_parts["optimizer"] == here.parts["optimizer"]


@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16"}, {"offload": "activations"}])
def test_checkpointing_is_planned_for_a_gpu_too(settings: dict[str, Any]) -> None:
    given = {**SMALL, "device": "cuda", "optimizer": "sgd", **settings}
    plain, twice = (
        gt.plan(LLAMA, gt.LoRA(), gradient_checkpointing=on, **given) for on in (False, True)
    )
    assert twice.flops > 1.2 * plain.flops
    assert twice.peak_bytes < plain.peak_bytes or settings.get("offload")


def test_a_gpu_keeps_a_byte_of_dropout_where_the_cpu_keeps_a_float() -> None:
    cpu, cuda = (
        gt.plan(BERT, gt.LoRA(), device=device, **SMALL).parts["activations"]
        for device in ("cpu", "cuda")
    )
    hidden = 4 * 32 * 256 * (1 + 2 * 4)  # after the embeddings, and twice in each block
    assert cpu - cuda >= 3 * hidden


def test_a_side_network_needs_less_than_lora() -> None:
    lora, ladder = (gt.plan(BERT, m, **SMALL) for m in (gt.LoRA(), gt.LadderSideTuning()))
    assert ladder.rise_bytes < 0.5 * lora.rise_bytes


def test_a_bigger_batch_needs_more_and_split_in_two_less() -> None:
    one, two = (gt.plan(BERT, gt.LoRA(), length=32, batch_size=n) for n in (4, 8))
    split = gt.plan(BERT, gt.LoRA(), length=32, batch_size=4, accumulation=2)
    assert one.rise_bytes < split.rise_bytes < two.rise_bytes
    assert split.flops == pytest.approx(two.flops, rel=0.01)


def test_operations_of_lora_are_those_of_its_formula() -> None:
    found = gt.plan(LLAMA, gt.LoRA(r=1, targets="query"), batch_size=1, length=64)
    linears = 4 * (256 * 256 * 2 + 2 * 256 * 128 + 3 * 256 * 688) + 4000 * 256
    passes = 2 + 2  # forward, and the gradient of what entered; frozen weights need none
    assert found.flops == pytest.approx(passes * linears * 64, rel=0.1)


def test_seventy_billion_parameters_need_no_memory_to_plan() -> None:
    config = {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128000,
        "tie_word_embeddings": False,
    }
    found = gt.plan(config, gt.LoRA(), precision="bfloat16", device="cuda", length=512)
    assert found.parts["weights"] > 7 * 10**9


def test_configurations_come_as_files_folders_dictionaries_and_objects(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    config = base_of(BERT, None, 2).config
    given = (BERT, config, tmp_path, str(tmp_path / "config.json"))
    peaks = {gt.plan(one, gt.LoRA(), **SMALL).peak_bytes for one in given}
    assert len(peaks) == 1


def test_a_configuration_is_left_as_it_was() -> None:
    config = base_of(BERT, None, 2).config
    before = config.to_dict()
    gt.plan(config, gt.LoRA(), labels=7, **SMALL)
    assert config.to_dict() == before


def test_an_unknown_model_type_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r'"bret".*Did you mean "bert"'):
        gt.plan({**BERT, "model_type": "bret"}, gt.LoRA())


def test_a_folder_without_configuration_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json"):
        gt.plan(str(tmp_path), gt.LoRA())


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="is no configuration"):
        gt.plan(tmp_path, gt.LoRA())


def test_a_method_that_cant_act_says_why() -> None:
    with pytest.raises(SettingsError, match="no module of this ViTForImageClassification"):
        gt.plan(VIT, gt.PTuning())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "bf16"}, "precision is 'bf16'"),
        ({"optimizer": "adamw_8bits"}, 'Did you mean "adamw_8bit"'),
        ({"quantise": "nf4"}, 'Did you mean "quantize"'),
        ({"quantize": "nf5"}, 'Did you mean "nf4"'),
        ({"double_quant": True}, "double_quant is for"),
        ({"batch_size": 0}, "at least 1"),
        ({"offload": "activations"}, "no other memory"),
        ({"offload": "activation", "device": "cuda"}, 'Did you mean "activations"'),
        ({"length": 4096}, "takes at most 512 tokens"),
        ({"device": "gpu"}, "expected one of cpu, cuda"),
        ({"task": "classifcation"}, 'Did you mean "classification"'),
        ({"task": "image-classification"}, "no class of for image-classification"),
    ],
)
def test_what_cant_be_is_refused_with_the_way_on(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        gt.plan(BERT, gt.LoRA(), **settings)


def test_a_plan_is_frozen() -> None:
    found = gt.plan(BERT, "lora", **SMALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.flops = 0  # pyright: ignore
