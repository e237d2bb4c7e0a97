"""The model card: README.md with the metadata that model hubs read, and how to load the adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says; nothing in it depends on when or where it is written."""

    name: str
    method: str
    paper: str
    settings: Mapping[str, Any]
    base: str
    """Name or folder of the base model, or ''."""
    model_class: str
    task: str | None
    peft: bool
    """Whether HF PEFT loads the directory."""
    trainable: int
    changed: int
    """Entries of base weights that the adapter changes when applied."""
    rank: int | None
    """Largest rank of a change."""
    base_parameters: int
    heads: tuple[str, ...]
    size: int
    """Bytes of the tensor file."""
    versions: Mapping[str, str]


def render(facts: CardFacts) -> str:
    """Returns the card's text."""
    parts = [_metadata(facts), _opening(facts), _numbers(facts), _settings(facts), _use(facts)]
    versions = "\n".join(f"- {name} {version}" for name, version in sorted(facts.versions.items()))
    return "\n".join([*parts, "## Framework versions\n", versions, ""])


def _metadata(facts: CardFacts) -> str:
    hub_id = _hub_id(facts.base)
    tags = [facts.method.lower(), "transformers", "graftune"]
    lines = ["---", f"library_name: {'peft' if facts.peft else 'graftune'}"]
    if hub_id:
        lines.append(f"base_model: {hub_id}")
        lines.append("base_model_relation: adapter")
        tags.insert(0, f"base_model:adapter:{hub_id}")
    if facts.task in PIPELINES:
        lines.append(f"pipeline_tag: {PIPELINES[facts.task]}")
    lines += ["tags:", *(f"- {json.dumps(tag) if ':' in tag else tag}" for tag in tags), "---", ""]
    return "\n".join(lines)


def _opening(facts: CardFacts) -> str:
    base = f"`{facts.base}`" if facts.base else f"a {facts.model_class}"
    paper = f"\n\nMethod: {facts.paper}." if facts.paper else ""
    return f"# {facts.name}\n\nA {facts.method} adapter for {base} ({facts.model_class}).{paper}\n"


def _numbers(facts: CardFacts) -> str:
    share = facts.trainable / facts.base_parameters if facts.base_parameters else 0.0
    rank = "not bounded" if facts.rank is None else f"at most {facts.rank}"
    heads = ", ".join(f"`{head}`" for head in facts.heads) or "none"
    rows = [
        ("Trained parameters", f"{facts.trainable:,} ({share:.3%} of the base)"),
        ("Base weights changed when applied", f"{facts.changed:,}"),
        ("Rank of the change per matrix", rank),
        ("Modules saved whole", heads),
        ("Size of the weights on disk", f"{facts.size:,} bytes"),
        ("Parameters of the base", f"{facts.base_parameters:,}"),
    ]
    return "## Size\n\n| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in rows)


def _settings(facts: CardFacts) -> str:
    rows = "".join(
        f"| {key} | `{json.dumps(value, ensure_ascii=False)}` |\n"
        for key, value in sorted(facts.settings.items())
        if key != "method"
    )
    return f"## Settings\n\n| setting | value |\n|---|---|\n{rows}"


def _use(facts: CardFacts) -> str:
    base = facts.base or "the base model"
    auto = (
        f"from transformers import {facts.model_class}\n\n"
        f'model = {facts.model_class}.from_pretrained("{base}")'
    )
    text = (
        f"## How to load\n\n```python\nimport graftune as gt\n{auto}\n"
        f'gt.load(model, "path/to/{facts.name}", name="{facts.name}")\n```\n'
    )
    if facts.peft:
        text += (
            f"\nor with HF PEFT:\n\n```python\nfrom peft import PeftModel\n{auto}\n"
            f'model = PeftModel.from_pretrained(model, "path/to/{facts.name}")\n```\n'
        )
    return text


def _hub_id(base: str) -> str | None:
    """Returns the base's name if it may be one on a hub: not a path of this machine."""
    plain = base.replace("/", "", 1).replace("-", "").replace("_", "").replace(".", "")
    is_name = plain.isalnum() and not base.startswith((".", "/"))
    return base if is_name else None
