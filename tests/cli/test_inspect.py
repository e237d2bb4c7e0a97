import subprocess
import sys


def test_a_runs_directory_stands_for_its_adapter(graftune, trained):
    out, _ = trained
    shown = graftune("inspect", out)
    assert shown.code == 0, shown.err
    assert "LoRA" in shown.out
    assert "vLLM" in shown.out
    assert (
        graftune("inspect", out, "--json").json
        == graftune("inspect", out / "adapter", "--json").json
    )


def test_tensors_are_listed_when_asked_for(graftune, trained):
    out, _ = trained
    assert "lora_A" not in graftune("inspect", out).out
    assert "lora_A" in graftune("inspect", out, "--tensors", "--check-values").out


def test_inspect_imports_no_torch(trained):
    out, _ = trained
    code = (
        "import sys; from graftune.cli import main\n"
        f"sys.argv = ['graftune', 'inspect', {str(out)!r}]\n"
        "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "False"


def test_a_foreign_folder_is_an_error(graftune, tmp_path):
    ended = graftune("inspect", tmp_path)
    assert ended.code == 2
    assert "adapter_config.json" in ended.err
