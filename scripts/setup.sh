#!/bin/sh
# Makes or mends .venv with all that development, tests and the demo need. Called by the Makefile.
# PYTHON names the interpreter; GRAFTUNE_PIP_ARGS is given to every pip call (an index, a proxy).
set -eu
root="$(pwd -P)"
venv="$root/.venv"
python="${PYTHON:-python3}"

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
# shellcheck disable=SC2086  # the arguments are meant to be split
pip_install() { "$venv/bin/python" -m pip install -q ${GRAFTUNE_PIP_ARGS:-} "$@"; }

is_whole() {
    grep -qF "$venv" "$venv/bin/activate" 2>/dev/null && "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

make_venv() {
    command -v "$python" >/dev/null || fail "no $python here; name one with: make setup PYTHON=python3.12"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "needs Python 3.11 or newer, $python is $("$python" --version); try: make setup PYTHON=python3.12"
    rm -rf "$venv"
    "$python" -m venv "$venv" >/dev/null 2>&1 && return
    # Some systems ship venv without ensurepip: their own pip can put one in.
    rm -rf "$venv"
    "$python" -m venv --without-pip "$venv" &&
        "$python" -m pip --python "$venv/bin/python" install -q pip ||
        fail "$python can make no virtual environment; install its venv package (python3-venv), then try again"
}

# Without a GPU the small CPU build of torch: from pip's own indexes where they have it, else with
# uv, which knows where that build lies, else whatever `pip install torch` gives (it works, but is large).
install_cpu_torch() {
    if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null; then return; fi
    version="$(sed -n 's/^torch==//p' constraints.txt)"
    installed="$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)"
    [ "${installed%%+*}" = "$version" ] && return
    pip_install "torch==$version+cpu" 2>/dev/null && return
    pip_install uv && "$venv/bin/python" -m uv pip install -q --no-deps --torch-backend cpu \
        --python "$venv/bin/python" "torch==$version" && return
    say "no CPU build of torch found, taking the default build"
}

is_whole || { say "making .venv (some minutes, once)"; make_venv; }
install_cpu_torch
pip_install -c constraints.txt -e '.[dev,serve]'
pip_install --no-deps -r requirements-demo.txt
printf '%s\n' "$root" >"$venv/.ready"
