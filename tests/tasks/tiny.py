"""Tiny models with real tokenizers, made in a folder in which `load_base` finds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WORDS = [
    *("where", "is", "my", "parcel", "money", "back", "please", "i", "want", "the", "refund"),
    *("late", "delivery", "it", "has", "not", "come", "pay", "a", "now", "soon", "you", "can"),
    *("user", "assistant", "system", "hello", "yes", "no", "what", "say", "good", "day"),
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mail(count: int = 60) -> list[dict[str, str]]:
    """Distinct messages of two labels that one word tells apart."""
    fillers = [
        f"{a} {b} {c}"
        for a in ("hello", "please", "good")
        for b in ("i", "you", "now", "soon", "yes")
        for c in ("want", "can", "day", "say")
    ]
    sides = (("parcel", "delivery"), ("money", "refund"))
    return [
        {"text": f"{fillers[i // 2 % len(fillers)]} {sides[i % 2][0]}", "label": sides[i % 2][1]}
        for i in range(count)
    ]


def tagged(count: int = 60) -> list[dict[str, list[str]]]:
    """Distinct texts with one entity of a single word and one of two words."""
    rows: list[dict[str, list[str]]] = []
    for i in range(count):
        first, second = WORDS[i % 4 * 2], WORDS[10 + i // 4 % 15]
        words = [first, "parcel", second, "money", "back"][: 5 if i % 3 else 3]
        tags = ["O", "B-thing", "O", "B-sum", "I-sum"][: len(words)]
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


def passages(count: int = 60) -> list[dict[str, Any]]:
    """Distinct passages that hold the answer, "money back", somewhere."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        before = [WORDS[(i + n) % 4] for n in range(i % 5)]
        after = [WORDS[11 + (i // 5 + n) % 12] for n in range(3)]
        context = " ".join([*before, "money back", *after])
        place = {"text": "money back", "answer_start": context.index("money")}
        rows.append({"question": "what is it", "context": context, "answers": [place]})
    return rows


def lessons(count: int = 24) -> list[dict[str, str]]:
    """Distinct instructions, all answered alike."""
    return [
        {"instruction": f"say {a} {b}", "answer": "hello yes good day"}
        for a in WORDS[:6]
        for b in WORDS[6:10]
    ][:count]


def bert(folder: Path) -> Path:
    """A BERT of two blocks without a classification head, so that its head is new."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = _tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[PAD]", "[UNK]")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return _saved(BertModel(config), tokenizer, folder)


def masked_bert(folder: Path, positions: int = 64) -> Path:
    """A BERT of two blocks that says what is masked."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = _tokenizer(specials, "[PAD]", "[UNK]")
    tokenizer.mask_token = "[MASK]"
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=positions, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return _saved(BertForMaskedLM(config), tokenizer, folder)


def llama(
    folder: Path, *, template: str | None = CHATML, positions: int = 128, width: int = 32
) -> Path:
    """A LLaMA of two blocks with a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    specials = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _tokenizer(specials, "<pad>", "<unk>", eos="<|im_end|>")
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=2 * width, max_position_embeddings=positions,
        pad_token_id=0, bos_token_id=None, eos_token_id=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return _saved(LlamaForCausalLM(config), tokenizer, folder)


def t5(folder: Path) -> Path:
    """A T5 of two blocks, gated, without a chat template."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = _tokenizer(["<pad>", "<unk>", "</s>"], "<pad>", "<unk>", eos="</s>")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return _saved(T5ForConditionalGeneration(config), tokenizer, folder)


def bart(folder: Path) -> Path:
    """A BART of two blocks each side."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = _tokenizer(["<pad>", "<unk>", "</s>"], "<pad>", "<unk>", eos="</s>")
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
        bos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return _saved(BartForConditionalGeneration(config), tokenizer, folder)


def vit(folder: Path) -> Path:
    """A vision transformer of two blocks for images of 16 by 16, and its image processor."""
    import torch
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = ViTModel(config, add_pooling_layer=False)
    return _saved(model, ViTImageProcessorPil(size={"height": 16, "width": 16}), folder)


def gpt2(folder: Path) -> Path:
    """A GPT-2 of two blocks; each byte is a token, and a space belongs to what follows it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|end|>", *alphabet, *(f"\u0120{letter}" for letter in letters)]
    merges = [("\u0120", letter) for letter in letters]
    inner = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    config = GPT2Config(
        vocab_size=len(pieces), n_embd=32, n_layer=2, n_head=2, n_positions=128,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return _saved(GPT2LMHeadModel(config), tokenizer, folder)


def _tokenizer(specials: Sequence[str], pad: str, unknown: str, eos: str | None = None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*specials, "\n", "#", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if "[CLS]" in specials:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, unk_token=unknown, eos_token=eos,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"][:: 2 if eos else 1],
        additional_special_tokens=[s for s in specials if s not in (pad, unknown, eos)],
    )  # fmt: skip


def _saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
