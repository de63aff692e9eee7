#!/usr/bin/env bash
# Builds lightvlm and runs the demo: the reference VLM on held-out pictures, with the full model and with LightVLM.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh ".[demo]"
exec "${VENV:-.venv}/bin/lightvlm" demo "$@"
