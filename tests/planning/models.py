"""Small configurations of four kinds, whose steps take hundreds of MiB at these shapes."""

from __future__ import annotations

from typing import Any

BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 4000,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 256,
    "d_ff": 1024,
    "d_kv": 32,
    "num_layers": 3,
    "num_heads": 8,
    "vocab_size": 4000,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
VIT: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "image_size": 112,
    "patch_size": 16,
}
