"""Bases in 4 and 8 bit from settings to a merged checkpoint, and what is refused on the way."""

import importlib.util
import json
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import graftune as gt
from graftune.anatomy.packed import elements, is_packed, stored_bytes, stored_parts
from graftune.cli import main
from graftune.errors import AdapterError, SettingsError
from graftune.sites.quantised import keep_exact
from graftune.tasks import quantising
from graftune.tasks.models import load_base
from graftune.tasks.quantising import Quantising
from tests.contract.subjects import shake
from tests.tasks import tiny

pytest.importorskip("bitsandbytes", reason="bases in 4 and 8 bit need bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("quantised")
    tiny.llama(found / "llama", width=64)
    tiny.write_jsonl(found / "rows.jsonl", tiny.lessons(24))
    return found


@pytest.fixture(scope="module")
def trained(folder, graftune):
    """The folder of a run on NF4, by the command line."""
    out = folder / "run"
    ended = graftune(
        "train", "--base", folder / "llama", "--data", folder / "rows.jsonl", "--task", "instruct",
        "--method", "lora", "--quantize", "nf4", "--steps", 30, "--lr", 0.02, "--batch-size", 8,
        "--out", out,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    return out, ended


def test_a_run_trains_saves_reloads_merges_and_generates(folder, graftune, trained):
    out, ended = trained
    assert "kernels" not in ended.err
    told = json.loads((out / "graftune_task.json").read_text())
    assert told["quantize"] == "nf4"
    assert told["double_quant"]
    answer = graftune("predict", out, "say where is", "--max-new-tokens", 8, "--json")
    assert answer.code == 0, answer.err
    ended = graftune("merge", out, "--into", folder / "merged", "--dequantize", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["max_probability_difference"] < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    assert not any(is_packed(tensor) for tensor in merged.parameters())
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say where is"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    ids = merged.generate(**prompt, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "hello yes good day" in text
    assert text.strip() in answer.out


def test_what_is_lost_by_quantising_again_is_refused_above_the_tolerance(
    graftune, trained, tmp_path
):
    out, _ = trained
    into = tmp_path / "merged"
    ended = graftune("merge", out, "--into", into, "--requantize")
    assert ended.code == 1
    assert "above --tolerance" in ended.err
    assert "--dequantize" in ended.err
    assert list(tmp_path.iterdir()) == []
    ended = graftune("merge", out, "--into", into, "--requantize", "--tolerance", 100, "--json")
    assert ended.code == 0, ended.err
    assert 1e-3 < ended.json["max_logit_difference"] < 100
    again = AutoModelForCausalLM.from_pretrained(into)
    assert any(is_packed(tensor) for tensor in again.parameters())


def test_a_merge_of_codes_says_which_flags_there_are(graftune, trained, tmp_path):
    out, _ = trained
    for flags, words in (
        ((), "--dequantize"),
        (("--dequantize", "--requantize"), "give one of the two"),
        (("--requantize", "--dtype", "float16"), "--dtype is for plain weights"),
        (("--dequantize", "--dtype", "flot16"), 'Did you mean "float16"'),
    ):
        ended = graftune("merge", out, "--into", tmp_path / "merged", *flags)
        assert ended.code
        assert words in ended.err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_on_another_quantisation_is_loaded_and_warned_of(folder, trained):
    out, _ = trained
    for quantize, words in ((None, "no quantisation"), (Quantising("int8"), "int8")):
        base = load_base(str(folder / "llama"), "causal-lm", quantize=quantize)
        with pytest.warns(
            UserWarning, match=f"trained over .* with nf4, and this base has {words}"
        ):
            gt.load(base.model, out / "adapter", "x")
    base = load_base(str(folder / "llama"), "causal-lm", quantize=Quantising("nf4"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gt.load(base.model, out / "adapter", "x")


@pytest.mark.parametrize(
    ("scheme", "double", "bits"),
    [("nf4", True, 4.13), ("nf4", False, 4.501), ("fp4", True, 4.13), ("int8", True, 8.2)],
)
def test_linears_take_the_bits_that_the_paper_says(folder, scheme, double, bits):
    wide = folder / "wide"
    if not wide.exists():
        tiny.llama(wide, width=512)
    base = load_base(str(wide), "causal-lm", quantize=Quantising(scheme, double))
    hosts = [m for m in base.model.modules() if is_packed(getattr(m, "weight", torch.empty(0)))]
    assert len(hosts) == 14
    parts = {
        part.data_ptr(): part.nbytes for host in hosts for part in stored_parts(host, host.weight)
    }
    count = sum(elements(host.weight) for host in hosts)
    assert bits - 0.15 < 8 * sum(parts.values()) / count <= bits
    rest = sum(p.nbytes for p in base.model.parameters() if not is_packed(p))
    assert stored_bytes(base.model) == sum(parts.values()) + rest


def test_a_saved_model_has_its_own_tables_and_loads_again(folder, tmp_path):
    base = load_base(str(folder / "llama"), "causal-lm", quantize=Quantising("nf4"))
    ids = torch.randint(0, 20, (2, 8))
    base.model.save_pretrained(tmp_path)
    again = load_base(str(folder / "llama"), "causal-lm", quantize=Quantising("nf4"))
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    keep_exact(other)
    with torch.no_grad():
        expected = base.model(ids).logits
        assert torch.equal(again.model(ids).logits, expected)
        assert torch.allclose(other(ids).logits, expected, atol=1e-5)


def test_the_adapter_is_float32_beside_a_base_in_bfloat16(folder):
    base = load_base(
        str(folder / "llama"), "causal-lm", dtype="bfloat16", quantize=Quantising("nf4")
    )
    adapter = gt.attach(base.model, gt.LoRA(r=2))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    ids = torch.randint(0, 20, (2, 8))
    loss = base.model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize(
    ("scheme", "package", "words"),
    [
        ("nf4", "bitsandbytes", r'needs the package bitsandbytes: .*"graftune\[quant\]"'),
        ("torchao-int8", "torchao", "needs the package torchao: pip install torchao"),
    ],
)
def test_a_missing_quantiser_is_named_with_how_to_get_it(monkeypatch, scheme, package, words):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else found(name)
    )
    with pytest.raises(SettingsError, match=words):
        Quantising(scheme).check()


def test_a_device_without_a_kernel_is_refused_with_what_has_one(monkeypatch):
    monkeypatch.setattr(quantising, "check_package", lambda *_: None)
    monkeypatch.setattr(quantising, "device", lambda: "cpu")
    with pytest.raises(SettingsError, match=r"torchao-int4 has no kernel for .* a CPU; nf4 is"):
        Quantising("torchao-int4").check()


def test_an_unknown_scheme_is_refused_with_the_nearest():
    with pytest.raises(SettingsError, match=r'quantize is "nf5"; .*Did you mean "nf4"'):
        Quantising("nf5")


def test_a_base_that_is_quantised_already_is_not_quantised_again():
    config = SimpleNamespace(quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(SettingsError, match=r'"it" is quantised already \(by bitsandbytes\)'):
        quantising.check_plain(config, "it", Quantising("nf4"))
    quantising.check_plain(config, "it", None)


def test_a_base_too_narrow_for_the_kernel_is_refused(tmp_path):
    tiny.llama(tmp_path / "narrow", width=16)
    with pytest.raises(SettingsError, match=r"finds nothing to quantise: .* multiple of 64"):
        load_base(str(tmp_path / "narrow"), "causal-lm", quantize=Quantising("nf4"))


def test_adapters_train_in_bfloat16_where_asked(folder, graftune, tmp_path):
    def trained_by(method):
        return graftune(
            "train", "--base", folder / "llama", "--data", folder / "rows.jsonl", "--task",
            "instruct", "--method", method, "--quantize", "nf4", "--steps", 2, "--batch-size", 8,
            "--set", "train.adapter_precision=bfloat16", "--out", tmp_path / method,
        )  # fmt: skip

    ended = trained_by("lora")
    assert ended.code == 0, ended.err
    tensors = load_file(tmp_path / "lora" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    ended = trained_by("loreft")
    assert ended.code == 2
    assert "LoReFT needs float32, found bfloat16" in ended.err


def test_the_command_line_hushes_a_quantiser_that_is_merely_imported(monkeypatch):
    logger = logging.getLogger("bitsandbytes")
    logger.setLevel(logging.NOTSET)
    monkeypatch.setattr("graftune.cli.app.app", lambda **_: None)
    main()
    assert not logger.isEnabledFor(logging.WARNING)


def test_torchaos_eight_bits_train_and_merge_as_plain_numbers(folder):
    pytest.importorskip("torchao", reason="torchao is not installed")
    base = load_base(str(folder / "llama"), "causal-lm", quantize=Quantising("torchao-int8"))
    assert sum(is_packed(tensor) for tensor in base.model.parameters()) == 14
    plain = load_base(str(folder / "llama"), "causal-lm").model
    assert gt.summary(base.model).base == sum(p.numel() for p in plain.parameters())
    adapter = gt.attach(base.model, gt.LoRA(r=2), "x")
    shake(adapter, seed=1)
    ids = torch.randint(0, 20, (2, 8))
    base.model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    with torch.no_grad():
        expected = base.model(ids).logits
        with pytest.raises(AdapterError, match="by torchao, which is not done again here"):
            gt.merge(base.model, "x", quantized="requantize")
        gt.merge(base.model, "x", quantized="dequantize")
        assert torch.allclose(base.model(ids).logits, expected, atol=1e-4)
        gt.unmerge(base.model)
        assert torch.equal(base.model(ids).logits, expected)
