#!/usr/bin/env bash
# Builds lightvlm for development and runs every test that this machine can run.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh -e ".[dev]"
exec "${VENV:-.venv}/bin/python" -m pytest "$@"
