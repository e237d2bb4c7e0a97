"""`graftune transfer` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graftune.compare.similarity import similarity
from graftune.formats.tensors import read_tensors


def tokens(folder: Path) -> torch.Tensor:
    saved = read_tensors(folder / "adapter_model.safetensors")
    return next(value for name, value in saved.items() if "prompt" in name)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, graftune, base, rows) -> Path:
    """A folder with the finished runs of a target, with checkpoints, and of three sources."""
    folder = tmp_path_factory.mktemp("prompts")
    for seed, name in enumerate(("new", "a", "b", "c")):
        ended = graftune(
            "train", "--base", base, "--data", rows, "--method", "prompttuning", "--seed", seed,
            "--steps", 4, "--set", "method.length=3", "--set", "method.init=random",
            "--out", folder / name, "--quiet", "--no-report",
            "--set", f"train.eval_every={2 if name == 'new' else 0}",
        )  # fmt: skip
        assert ended.code == 0, ended.err
    return folder


@pytest.fixture(scope="module")
def tuned(prompts, graftune):
    words = ["transfer", prompts / "new", *(prompts / name for name in "abc"), "--k", 2,
             "--out", prompts / "best", "--quiet", "--json"]  # fmt: skip
    return words, graftune(*words)


def test_sources_are_ranked_by_how_like_their_prompts_are(prompts, graftune) -> None:
    sources = [prompts / "a", prompts / "b" / "adapter", prompts / "c"]
    for kind in ("mean", "pairs"):
        ended = graftune("transfer", prompts / "new", *sources, "--how", "rank",
                         "--similarity", kind, "--json", "--out", prompts / "rank")  # fmt: skip
        assert ended.code == 0, ended.err
        target = tokens(prompts / "new" / "adapter")
        wanted = {n: similarity(tokens(prompts / n / "adapter"), target, kind) for n in "abc"}
        found = {one["name"]: one["similarity"] for one in ended.json["ranking"]}
        assert found == pytest.approx(wanted)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert json.loads((prompts / "rank" / "transfer.json").read_text()) == ended.json
    assert [path.name for path in (prompts / "rank").iterdir()] == ["transfer.json"]


def test_a_checkpoint_is_a_target_and_its_run_says_what_is_trained(prompts, graftune) -> None:
    early = min((prompts / "new" / "checkpoints").glob("checkpoint-*"))
    ended = graftune("transfer", early, prompts / "new", prompts / "a", "--how", "rank", "--quiet",
                     "--out", prompts / "early")  # fmt: skip
    assert ended.code == 0, ended.err
    likest = json.loads((prompts / "early" / "transfer.json").read_text())["ranking"][0]
    assert likest["name"] == "new"
    assert likest["similarity"] > 0.9
    assert "source  similarity" in ended.out


def test_best_tunes_from_the_k_likest_and_keeps_the_best_on_validation_rows(prompts, tuned) -> None:
    _, ended = tuned
    assert ended.code == 0, ended.err
    used, rest = ended.json["ranking"][:2], ended.json["ranking"][2:]
    for source in used:
        run = json.loads((Path(source["run_dir"]) / "result.json").read_text())
        assert run["settings"]["start"] == source["path"]
        assert run["settings"]["train"]["steps"] == 4
        assert run["metrics"] == source["metrics"]
    assert [source["run_dir"] for source in rest] == [""]
    best = max(used, key=lambda source: source["metrics"]["validation"]["accuracy"])
    assert ended.json["chosen"] == best["run_dir"]
    assert ended.json["metrics"] == best["metrics"]


def test_what_is_finished_is_not_done_again(prompts, tuned, graftune) -> None:
    words, ended = tuned
    made = {path: path.stat().st_mtime_ns for path in (prompts / "best").glob("*/result.json")}
    assert graftune(*words).json == ended.json
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_average_starts_from_the_weighted_average(prompts, graftune) -> None:
    def averaged(out: str, *sources: str) -> dict:
        ended = graftune("transfer", prompts / "new", *(prompts / name for name in sources),
                         "--how", "average", "--out", prompts / out, "--quiet", "--json",
                         "--set", "train.lr=1e-30")  # fmt: skip
        assert ended.code == 0, ended.err
        return ended.json

    found = averaged("several", "new/checkpoints/checkpoint-2", "a", "b")
    weights = {one["name"]: one["weight"] for one in found["ranking"]}
    sims = {one["name"]: max(0, one["similarity"]) for one in found["ranking"]}
    assert weights == pytest.approx({name: sims[name] / sum(sims.values()) for name in sims})
    at = {one["name"]: Path(one["path"]) for one in found["ranking"]}
    each = {n: tokens(p / "adapter" if (p / "adapter").exists() else p) for n, p in at.items()}
    wanted = sum(weights[name] * each[name] for name in each)
    assert torch.allclose(tokens(Path(found["chosen"]) / "adapter"), wanted)
    one = averaged("one", "new/checkpoints/checkpoint-2")
    [alone] = [each[n] for n in each if "checkpoint" in n]
    assert torch.equal(tokens(Path(one["chosen"]) / "adapter"), alone)


def test_mixture_trains_one_prompt_on_the_likest_tasks_and_the_target_starts_from_it(
    prompts, graftune, rows
) -> None:
    words = ["transfer", prompts / "new", *(prompts / name for name in "abc"), "--k", 2, "--json",
             "--how", "mixture", "--cap", 20, "--out", prompts / "mixed", "--quiet"]  # fmt: skip
    ended = graftune(*words)
    assert ended.code == 0, ended.err
    likest = [source["name"] for source in ended.json["ranking"][:2]]
    assert ended.json["mixture"] == {**dict.fromkeys(likest, 20), "(target)": 20}
    data = prompts / "mixed" / "mixture-data"
    train = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    assert {row["label"].split("/")[0] for row in train} == {*likest, "(target)"}
    mixture = json.loads((prompts / "mixed" / "mixture" / "result.json").read_text())
    assert mixture["settings"]["task"] == "multitask"
    assert len(mixture["labels"]) == 9
    assert mixture["metrics"].keys() == {"validation"}
    tuned = json.loads((Path(ended.json["chosen"]) / "result.json").read_text())
    assert tuned["settings"]["start"] == str(prompts / "mixed" / "mixture")
    assert tuned["settings"]["task"] == "classification"
    assert tuned["metrics"] == ended.json["metrics"]
    assert graftune(*words).json == ended.json


def test_a_mixture_needs_its_sources_tasks(prompts, graftune, tmp_path) -> None:
    import shutil

    alone = Path(shutil.copytree(prompts / "a" / "adapter", tmp_path / "x" / "alone"))
    words = ["transfer", prompts / "new", alone, "--how", "mixture", "--quiet",
             "--out", tmp_path / "out"]  # fmt: skip
    err = graftune(*words).err
    assert "a mixture needs the task and the training data of every source" in err
    assert "--source-settings alone=FILE" in err
    told = tmp_path / "told.yaml"
    text = (prompts / "a" / "run.yaml").read_text()
    told.write_text(text.replace("mail.jsonl", "gone.jsonl"))
    err = graftune(*words, "--source-settings", f"alone={told}").err
    assert 'the training data of "alone" can\'t be mixed in' in err
    told.write_text(text.replace("task: classification", "task: choices"))
    err = graftune(*words, "--source-settings", f"alone={told}").err
    assert 'source "alone" is of the task choices and the target of classification' in err
    assert not (tmp_path / "out").exists()
    told.write_text(text)
    ended = graftune(*words, "--source-settings", f"alone={told}")
    assert ended.code == 0, ended.err
    assert "rows" in ended.out
    err = graftune(*words, "--source-settings", f"alon={told}").err
    assert 'given for "alon"; the sources are alone. Did you mean "alone"?' in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "needs prompts of other tasks to start from: none is given"),
        (["a", "b", "--k", "3"], "k is 3, expected 1 to 2, the number of sources"),
        (["a", "--k", "0"], "k is 0, expected 1 to 1"),
        (["a", "new/adapter"], 'new/adapter" is the target itself'),
        (["a", "a/adapter"], "once more: give each prompt once"),
        (["a", "--how", "bets"], 'how is "bets", expected one of best, average, mixture, rank'),
        (["a", "--similarity", "median"], 'similarity is "median", expected one of mean, pairs'),
        (["a", "nowhere"], "no adapter directory at"),
        (["a", "--set", "data.validation_fraction=0"], "chooses by the validation rows"),
        (["a", "--set", "train.step=3"], 'Did you mean "steps"'),
        (["a", "--cap", "3"], 'a mixture alone has source settings and a cap; how is "best"'),
        (["a", "--how", "mixture", "--cap", "0"], "cap is 0, expected the rows of one task"),
        (["a", "--how", "mixture", "--source-settings", "a"], 'a", expected NAME=FILE'),
    ],
)
def test_what_can_not_be_is_told_before_anything_runs(words, told, prompts, graftune) -> None:
    names = {"a", "b", "nowhere", "new/adapter", "a/adapter"}
    words = [prompts / word if word in names else word for word in words]
    out = prompts / "wrong"
    ended = graftune("transfer", prompts / "new", *words, "--out", out, "--quiet")
    assert ended.code == 2, ended.out
    assert told in ended.err
    assert not out.exists()


def test_other_methods_lengths_bases_and_strays_are_refused(
    prompts, graftune, base, rows, trained, tmp_path
) -> None:
    import shutil

    def told(target: Path, source: Path, *more: object) -> str:
        ended = graftune("transfer", target, source, "--out", tmp_path / "out", "--quiet", *more)
        assert ended.code == 2, ended.out
        assert not (tmp_path / "out").exists()
        return ended.err

    assert "It is LoRA, which has no virtual tokens" in told(prompts / "new", trained[0])
    graftune("train", "--base", base, "--data", rows, "--method", "prompttuning", "--steps", 1,
             "--set", "method.length=4", "--out", tmp_path / "long", "--quiet")  # fmt: skip
    err = told(prompts / "new", tmp_path / "long")
    assert 'long" has 4 virtual tokens and the target 3' in err
    other = Path(shutil.copytree(prompts / "a" / "adapter", tmp_path / "other"))
    own = json.loads((other / "graftune.json").read_text())
    own["base"]["sizes"]["hidden_size"] = 48
    (other / "graftune.json").write_text(json.dumps(own))
    assert "with hidden_size 48" in told(prompts / "new", other)
    alone = Path(shutil.copytree(prompts / "new" / "adapter", tmp_path / "alone" / "x" / "adapter"))
    assert "isn't in a run's directory" in told(alone, prompts / "a")
