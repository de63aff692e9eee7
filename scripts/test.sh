#!/usr/bin/env bash
# Builds lightvlm for development and runs every test that this machine can run, two files at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh -e ".[dev]"
exec "${VENV:-.venv}/bin/python" -m pytest -n "${LIGHTVLM_TEST_JOBS:-2}" --dist loadfile "$@"
