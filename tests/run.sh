#!/usr/bin/env bash
# Every check and every test: set-up, style, types, floors, README, then pytest, files shared out over two processes.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
bin=.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
"$bin/cog" --check -r -I tests README.md
# one thread each for torch: two processes with two threads each take longer; files in their order: xdist would leave
# those of few tests to the end, and the longest are of those
OMP_NUM_THREADS=1 exec "$bin/python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
