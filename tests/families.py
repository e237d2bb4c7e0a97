"""The 24 model families every method is tried on, as tiny random models.

Each has width 32, two layers and four heads (two key-value heads where the family groups them),
no dropout, a vocabulary of 99, and runs on the CPU in milliseconds. A model's weights depend on its
settings alone: building it twice gives the same tensors, and the caller's random state is kept.
What `build` returns is the caller's own: a copy of a model that nobody else ever sees.
Biases and norms get noise, so that a test which confuses them with zeros or ones fails.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

Kind = Literal["encoder", "decoder", "encoder-decoder", "vision", "text-vision"]
Task = Literal["default", "classification"]
Padding = Literal["left", "right"] | None

PAD, BOS, EOS, FIRST, VOCABULARY, LABELS = 0, 1, 2, 5, 99, 3


@dataclass(frozen=True)
class Family:
    """One model type, its tiny settings and its task classes."""

    name: str
    kind: Kind
    default: str
    """Class of the family's natural task, in `transformers`."""
    classification: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    attention: str | None = None
    """Attention implementation, where the default one isn't exact for the family."""

    @property
    def generates(self) -> bool:
        """Whether the default class has a working `generate`."""
        return self.kind in ("decoder", "encoder-decoder")

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks whose classes differ; `build` takes both names wherever there is a class."""
        return (
            ("default",) if self.classification == self.default else ("default", "classification")
        )

    def model_class(self, task: Task = "default") -> type[PreTrainedModel]:
        """Returns the class that `build` makes."""
        name = self.classification if task == "classification" else self.default
        if name is None:
            raise ValueError(f"{self.name} has no class for {task}")
        return getattr(transformers, name)

    def config(self, dropout: float = 0.0, **overrides: Any) -> Any:
        """Returns the tiny config, every dropout set to `dropout`."""
        settings = {**self.settings, **overrides}
        config = AutoConfig.for_model(self.name, **settings)
        _set_dropout(config, dropout, keep=set(overrides))
        if self.attention and "attn_implementation" not in overrides:
            config._attn_implementation = self.attention
        return config

    def build(
        self,
        task: Task = "default",
        dtype: torch.dtype = torch.float32,
        meta: bool = False,
        dropout: float = 0.0,
        **config_overrides: Any,
    ) -> PreTrainedModel:
        """Returns a seeded model in eval mode; on the meta device, without numbers, if `meta`."""
        if meta or config_overrides:
            return self._made(task, dtype, meta, dropout, **config_overrides)
        return copy.deepcopy(_kept(self.name, task, dtype, dropout))

    def _made(
        self, task: Task, dtype: torch.dtype, meta: bool, dropout: float, **config_overrides: Any
    ) -> PreTrainedModel:
        config = self.config(dropout, **config_overrides)
        with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
            torch.default_generator.manual_seed(0)
            model = self.model_class(task)(config)
            if not meta:
                _add_noise(model)
        config.dtype = dtype
        return model.to(dtype).eval()

    def inputs(
        self,
        batch: int = 2,
        length: int = 7,
        seed: int = 0,
        padding: Padding = None,
        task: Task = "default",
    ) -> dict[str, Tensor]:
        """Returns the forward's arguments, without labels.

        With `padding` the first row holds `length - 2` real tokens (the same as its first ones
        without padding, but for an end token where rows have one) and the mask says so. Padded
        left, positions are given where the model takes them and doesn't find them itself, so that
        real tokens see what they see unpadded. Encoders that pool the first token, and BART's
        encoder with its learned positions, do differ when padded left, whatever is given.
        """
        draw = torch.Generator().manual_seed(seed)
        images = {"pixel_values": torch.randn(batch, 3, 16, 16, generator=draw)}
        sounds = {"input_features": torch.randn(batch, 8, 20, generator=draw)}
        if self.kind == "vision" or (self.name == "clip" and task == "classification"):
            return images
        if self.name == "whisper" and task == "classification":
            return sounds
        ids = torch.randint(FIRST, VOCABULARY - 1, (batch, length), generator=draw)
        if self.name == "whisper":
            return {**sounds, "decoder_input_ids": _starting_with(3, ids)}
        text = self._text(ids, padding, task)
        return {**text, **images} if self.kind == "text-vision" else text

    def _text(self, ids: Tensor, padding: Padding, task: Task) -> dict[str, Tensor]:
        last = {"encoder-decoder": EOS, "text-vision": VOCABULARY - 1}.get(self.kind)
        ids, mask = _pad(ids, padding, last)
        text = {"input_ids": ids, "attention_mask": mask}
        if self.kind == "encoder-decoder":
            start = PAD if self.name in ("t5", "mt5") else EOS
            text["decoder_input_ids"] = _starting_with(start, ids.clamp(min=FIRST))
        if padding == "left" and self._takes_positions(task):
            text["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return text

    def _takes_positions(self, task: Task) -> bool:
        finds_them_itself = self.name in ("roberta", "opt", "bloom")
        names = inspect.signature(self.model_class(task).forward).parameters
        return "position_ids" in names and not finds_them_itself

    def labels(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns the forward's arguments that make it return a loss (for CLIP not labels)."""
        name = type(model).__name__
        draw = torch.Generator().manual_seed(1)
        batch = next(iter(inputs.values())).shape[0]
        if name.endswith("Classification"):
            return {"labels": torch.randint(0, LABELS, (batch,), generator=draw)}
        if name == "CLIPModel":
            return {"return_loss": True}
        if "decoder_input_ids" in inputs:
            shape = inputs["decoder_input_ids"].shape
            return {"labels": torch.randint(FIRST, VOCABULARY - 1, shape, generator=draw)}
        mask = inputs["attention_mask"]
        return {"labels": inputs["input_ids"].masked_fill(mask == 0, -100)}


@functools.cache
def _kept(name: str, task: Task, dtype: torch.dtype, dropout: float) -> PreTrainedModel:
    """Returns the model that copies are made of, since copying takes a third of building's time."""
    return FAMILIES[name]._made(task, dtype, False, dropout)


def _set_dropout(config: Any, dropout: float, keep: set[str]) -> None:
    """Sets every dropout of `config` and its parts; layers and paths are never dropped."""
    for key, value in list(vars(config).items()):
        if key in getattr(config, "sub_configs", {}) and value is not None:
            _set_dropout(value, dropout, keep)
        elif "drop" in key and key not in keep and not isinstance(value, (bool, str)):
            setattr(config, key, 0.0 if "layer" in key or "path" in key else dropout)


def _add_noise(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def _pad(ids: Tensor, padding: Padding, last: int | None) -> tuple[Tensor, Tensor]:
    """Returns ids and mask, the first row two tokens shorter if `padding`; rows end in `last`."""
    mask = torch.ones_like(ids)
    ids = ids.clone()
    if last is not None:
        ids[:, -1] = last
    if padding:
        row = ids[0, :-2].clone()
        if last is not None:
            row[-1] = last
        gap, real = torch.full((2,), PAD), torch.ones_like(row)
        ids[0] = torch.cat([gap, row] if padding == "left" else [row, gap])
        mask[0] = torch.cat([0 * gap, real] if padding == "left" else [real, 0 * gap])
    return ids, mask


def _starting_with(start: int, ids: Tensor) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "num_labels": LABELS,
    "initializer_range": 0.1,
}
_STANDARD: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
_LLAMA: dict[str, Any] = {**_STANDARD, "num_key_value_heads": 2, "intermediate_size": 80}
_GPT: dict[str, Any] = {
    **_TOKENS,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "num_labels": LABELS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 80,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
_SEQ2SEQ: dict[str, Any] = {
    **{key: value for key, value in _TOKENS.items() if key != "initializer_range"},
    "init_std": 0.1,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
_WHISPER: dict[str, Any] = {
    **_SEQ2SEQ,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 64,
    "decoder_start_token_id": 3,
    "begin_suppress_tokens": None,
    "classifier_proj_size": 16,
}
_IMAGE: dict[str, Any] = {"image_size": 16, "num_labels": LABELS, "initializer_range": 0.1}
_VIT: dict[str, Any] = {
    **_IMAGE,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_SWIN: dict[str, Any] = {
    **_IMAGE,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 2,
}
_CLIP: dict[str, Any] = {
    "projection_dim": 16,
    "num_labels": LABELS,
    "text_config": {**_STANDARD, "eos_token_id": VOCABULARY - 1},
    "vision_config": _VIT,
}
_DEBERTA: dict[str, Any] = {
    **_STANDARD,
    "relative_attention": True,
    "max_relative_positions": 32,
    "position_buckets": 16,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0,
    "pooler_hidden_size": 32,
}
_MODERNBERT: dict[str, Any] = {
    **_STANDARD,
    "intermediate_size": 80,
    "global_attn_every_n_layers": 2,
    "local_attention": 8,
    "cls_token_id": BOS,
    "sep_token_id": EOS,
}
_DISTILBERT: dict[str, Any] = {
    **_TOKENS,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 128,
    "max_position_embeddings": 64,
}
_OPT: dict[str, Any] = {
    **{key: value for key, value in _STANDARD.items() if key != "intermediate_size"},
    "ffn_dim": 128,
    "word_embed_proj_dim": 32,
    "init_std": 0.1,
}


def _family(name: str, kind: Kind, prefix: str, task: str, **more: Any) -> Family:
    ending = "ForImageClassification" if kind in ("vision", "text-vision") else ""
    ending = ending or "ForSequenceClassification"
    return Family(name, kind, prefix + task, more.pop("classes", prefix + ending), **more)


def _encoder(name: str, prefix: str, settings: dict[str, Any]) -> Family:
    return _family(name, "encoder", prefix, "ForSequenceClassification", settings=settings)


def _decoder(name: str, prefix: str, settings: dict[str, Any], **more: Any) -> Family:
    task = more.pop("task", "ForCausalLM")
    return _family(name, "decoder", prefix, task, settings=settings, **more)


_ALL = (
    _encoder("bert", "Bert", _STANDARD),
    _encoder("roberta", "Roberta", _STANDARD),
    _encoder("electra", "Electra", {**_STANDARD, "embedding_size": 32}),
    _encoder("deberta-v2", "DebertaV2", _DEBERTA),
    _encoder("distilbert", "DistilBert", _DISTILBERT),
    _encoder("modernbert", "ModernBert", _MODERNBERT),
    _decoder("gpt2", "GPT2", _GPT, task="LMHeadModel"),
    _decoder("gpt_neox", "GPTNeoX", {**_STANDARD, "rotary_pct": 0.5}),
    _decoder("opt", "OPT", _OPT),
    _decoder("bloom", "Bloom", {**_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    _decoder("llama", "Llama", _LLAMA),
    _decoder("mistral", "Mistral", {**_LLAMA, "head_dim": 8, "sliding_window": 16}),
    _decoder("qwen2", "Qwen2", _LLAMA),
    _decoder("qwen3", "Qwen3", {**_LLAMA, "head_dim": 8}),
    _decoder(
        "gemma2",
        "Gemma2",
        {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
        attention="eager",
    ),
    _decoder("phi3", "Phi3", {**_LLAMA, "original_max_position_embeddings": 64}),
    _decoder(
        "mixtral",
        "Mixtral",
        {**_LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    _family("t5", "encoder-decoder", "T5", "ForConditionalGeneration", settings=_T5),
    _family(
        "mt5",
        "encoder-decoder",
        "MT5",
        "ForConditionalGeneration",
        settings={**_T5, "feed_forward_proj": "gated-gelu"},
    ),
    _family(
        "bart",
        "encoder-decoder",
        "Bart",
        "ForConditionalGeneration",
        settings={
            **_SEQ2SEQ,
            "max_position_embeddings": 64,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": None,
        },
    ),
    _family(
        "whisper",
        "encoder-decoder",
        "Whisper",
        "ForConditionalGeneration",
        classes="WhisperForAudioClassification",
        settings=_WHISPER,
    ),
    _family("vit", "vision", "ViT", "ForImageClassification", settings=_VIT),
    _family("swin", "vision", "Swin", "ForImageClassification", settings=_SWIN),
    _family("clip", "text-vision", "CLIP", "Model", settings=_CLIP),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
