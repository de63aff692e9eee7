#!/usr/bin/env bash
# Builds lightvlm into a virtual environment (.venv, or $VENV). What to install is the argument: ".[demo]", "-e .[dev]".
# torch comes first and pinned: with another torch, or under build isolation, pip fetches gigabytes of CUDA packages.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q -c constraints.txt torch
pip install -q -c constraints.txt setuptools wheel cmake ninja pybind11
pip install -q -c constraints.txt --no-build-isolation "$@"
