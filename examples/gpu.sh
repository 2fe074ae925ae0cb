#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: check, measure and run everything that needs one; a short table last, files in $OUT.
# PYTHON: an interpreter with torch for CUDA, triton, transformers, peft, onnxruntime-gpu and the rest of pyproject.toml.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-gpu-out}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Without an installation, the package and its plugins are found by path, and no entry points are asked for.
export PYTHONPATH="$PWD:$PWD/tests:${PYTHONPATH:-}"
unset TRITON_INTERPRET

"$python" - <<'PY' || exit 1
import torch
assert torch.cuda.is_available(), "torch sees no CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__)
PY

step() { # NAME COMMAND...: run it, keep what it says, remember how it ended
  local name=$1; shift
  echo "== $name"
  "$@" > "$out/$name.log" 2>&1
  local code=$?
  tail -n 25 "$out/$name.log"
  results+=("$(printf '%-12s %s' "$name" "$([ $code = 0 ] && echo passed || echo "FAILED ($code)")")")
  [ $code = 0 ] || failed=1
}

results=() failed=0
step tests "$python" -m pytest -q -m gpu tests/transforms tests/jobs tests/runtimes
step transform "$python" -c 'from ssh_deploy.cli.main import main; main()' bench transform --device cuda \
  --dtype bfloat16 --dtype float16 --dtype float32 --size 4096x4096 --size 1024x4096 --size 768x768 --out "$out/transform.json"
step graphs "$python" examples/gpu_graphs.py "$out/graphs.json"

echo
echo "$(date -u +%F) $("$python" -c 'import torch; print(torch.cuda.get_device_name())')"
printf '%s\n' "${results[@]}"
"$python" - "$out" <<'PY'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1]) / "transform.json"
if path.exists():
    for key, value in json.loads(path.read_text())["summary"].items():
        print(f"{key:<28} {value:g}")
PY
exit "$failed"
