"""What an adapter directory holds and who takes it, told without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import graftune as gt
from graftune.errors import FormatError
from graftune.formats.servers import READERS, Contents, Verdict, verdicts
from tests.families import FAMILIES


def saved(path: Path, method: Any, family: str = "llama", task: Any = "default") -> Path:
    return gt.attach(FAMILIES[family].build(task=task), method).save(path)


def test_it_tells_what_there_is(tmp_path: Path) -> None:
    found = gt.inspect(saved(tmp_path / "a", gt.LoRA(r=4, targets="attention")))
    assert found.method == "LoRA"
    assert found.wrote.startswith("graftune ")
    assert found.base_class == "LlamaForCausalLM"
    assert found.task == "CAUSAL_LM"
    assert found.ranks == (4,)
    assert found.targets == {"k_proj": 2, "o_proj": 2, "q_proj": 2, "v_proj": 2}
    assert found.parameters == sum(entry.count for entry in found.tensors)
    assert found.size == sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    assert found.nonfinite is None
    assert "q_proj (2)" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["verdicts"][0]["loads"] is True


def test_it_imports_no_torch(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", gt.LoRA(r=4))
    code = (
        "import sys, graftune as gt; gt.inspect(sys.argv[1], check_values=True);"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_it_counts_values_that_are_not_finite(tmp_path: Path) -> None:
    adapter = gt.attach(FAMILIES["llama"].build(), gt.LoRA(r=4))
    tensor = next(adapter.parameters())
    with torch.no_grad():
        tensor[0, :3] = float("nan")
    found = gt.inspect(adapter.save(tmp_path / "a"), check_values=True)
    assert found.nonfinite is not None
    assert list(found.nonfinite.values()) == [3]


def test_a_method_of_ours_is_for_us_alone(tmp_path: Path) -> None:
    found = gt.inspect(saved(tmp_path / "a", gt.BitFit(), "bert"))
    assert [verdict.loads for verdict in found.verdicts] == [False] * len(READERS)
    assert found.verdicts[0].obstacles == ("PEFT has no BITFIT",)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", gt.LoRA(r=4))
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(FormatError, match="as a pickle"):
        gt.inspect(path)


def verdict(reader: str, tensors: tuple[str, ...] = (), **config: Any) -> Verdict:
    names = ["x.q_proj.lora_A.weight", "x.q_proj.lora_B.weight", *tensors]
    ranks = config.pop("ranks", (8,))
    contents = Contents(config={"peft_type": "LORA"} | config, tensors=names, ranks=ranks)
    return {found.reader: found for found in verdicts(contents, ["LORA"])}[reader]


@pytest.mark.parametrize("reader", READERS)
def test_a_plain_lora_loads_everywhere(reader: str) -> None:
    assert verdict(reader).loads


@pytest.mark.parametrize("reader", READERS[1:])
@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["score"]}, "modules_to_save: score"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"tensors": ("x.norm.weight",)}, "isn't lora_A or lora_B"),
        ({"tensors": ("x.wte.lora_embedding_A",)}, "embeddings"),
    ],
)
def test_servers_take_plain_loras_alone(reader: str, config: dict[str, Any], told: str) -> None:
    found = verdict(reader, **config)
    assert not found.loads
    assert told in str(found)
    assert "graftune merge" in str(found)
    assert verdict("peft", **config).loads


def test_ranks_that_differ_are_scaled_wrongly_by_some() -> None:
    patterns = {"rank_pattern": {"q_proj": 4}}
    assert not verdict("vLLM", **patterns).loads
    assert not verdict("llama.cpp", **patterns).loads
    assert verdict("SGLang", **patterns).loads


def test_vllm_is_told_the_rank() -> None:
    assert verdict("vLLM", ranks=(4, 20)).mends == ("--max-lora-rank 32",)
    assert not verdict("vLLM", ranks=(600,)).loads


def test_rank_stabilised_scale_is_not_known_to_llama_cpp() -> None:
    assert not verdict("llama.cpp", use_rslora=True).loads
