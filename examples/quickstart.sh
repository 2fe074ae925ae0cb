#!/usr/bin/env bash
# The main job from nothing: make .venv, install, then merge, export, serve and compare the three real adapters.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python examples/quickstart.py "$@"
