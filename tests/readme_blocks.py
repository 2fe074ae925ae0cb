"""What cog writes into README.md: the captioned tree, help texts, and the measured tables from committed JSON."""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def caption(path: Path) -> str:
    """First line of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.splitlines()[0].rstrip(".") if docstring else ""


def tree() -> str:
    """The package as an indented list: every module with its caption."""
    lines = ["```"]

    def walk(folder: Path, depth: int) -> None:
        name = f"{folder.relative_to(ROOT)}/" if depth <= 1 else f"{folder.name}/"
        lines.append(f"{'  ' * max(0, depth - 1)}{name}".ljust(30) + caption(folder / "__init__.py"))
        modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        lines.extend(f"{'  ' * max(1, depth)}{path.name}".ljust(30) + caption(path) for path in modules)
        for deeper in sorted(p.parent for p in folder.glob("*/__init__.py")):
            walk(deeper, depth + 1)

    walk(ROOT / "ssh_deploy", 0)
    return "\n".join([*lines, "```"])


def help_of(*words: str) -> str:
    """``ssh-deploy WORDS --help`` as a console block."""
    command = [str(Path(sys.executable).parent / "ssh-deploy"), *words, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "100"}).stdout
    return f"```console\n$ ssh-deploy {' '.join([*words, '--help'])}\n{text.rstrip()}\n```"


def results(name: str) -> dict:
    """A committed results file of ``examples/results``."""
    return json.loads((ROOT / "examples" / "results" / f"{name}.json").read_text())


def quickstart_table() -> str:
    """What `bash examples/quickstart.sh` measured, from its committed figures."""
    found = results("quickstart")
    ways = list(next(iter(found["tasks"].values()))["accuracy"])
    head = ["accuracy", *ways, "the four agree", "sidecar logits from torch", "adapter file"]
    rows = [head, ["---", *["--:"] * (len(head) - 1)]]
    for task, row in found["tasks"].items():
        accuracies = [f"{row['accuracy'][way]:.4f}" for way in ways]
        size = f"{row['bytes'] / 1000:.0f} kB"
        rows.append([task, *accuracies, f"{row['agreement']:.2%}", f"{row['sidecar_max_diff']:.0e}", size])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    tail = (
        f"Swap, adapter file on disk to its first answer: {found['swap_ms']:.1f} ms over a resident run. "
        f"No adapter: bit-identical to the plain export. "
        f"Reproduce: `bash examples/quickstart.sh` ({found['seconds']:.0f} s on 2 CPU cores)."
    )
    return "\n".join([*lines, "", tail])


def families_table() -> str:
    """What `ssh-deploy plugins` lists, as Markdown."""
    command = [str(Path(sys.executable).parent / "ssh-deploy"), "plugins", "--json"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    lines = ["| family | from | merge | slots | trained by |", "|---|---|---|---|---|"]
    for row in listed["families"]:
        slots = ", ".join(row["slots"]) or "–"
        merge = "yes" if row["merge"] else "–"
        package, trainer = row["packages"][0].split()[0], (row["train"] or "–").replace(":", ".")
        lines.append(f"| {row['name']} | {package} | {merge} | {slots} | {trainer} |")
    return "\n".join(lines)


def peft_types_table() -> str:
    """What `ssh-deploy plugins --peft-types` lists, which is Markdown."""
    command = [str(Path(sys.executable).parent / "ssh-deploy"), "plugins", "--peft-types"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip()


def bank_table() -> str:
    """What `ssh-deploy bench bank` measured: times beside the plain model, and what a swap and 10,000 adapters cost."""
    found = results("bench_bank")
    shape = found["results"][0]["shape"]
    rows = [row for row in found["results"] if row["shape"] == shape and "ratio" in row]
    batches = ["1x16", "1x128", "8x64", "32x32"]
    titles = {
        "on": "every row its own adapter, 100 resident",
        "one": "one adapter for all rows",
        "off": "no adapter (bit-identical)",
        "lora8_bank": "LoRA r = 8, every row its own, gathered by id",
        "lora8_inputs": "LoRA r = 8 as optional inputs, one for all rows",
        "lora16_bank": "LoRA r = 16, every row its own, gathered by id",
        "lora16_inputs": "LoRA r = 16 as optional inputs, one for all rows",
    }
    shown = [batch for batch in batches if any(row["batch"] == batch and row["variant"] == "on" for row in rows)]
    lines = ["| time / plain model's | " + " | ".join(b.replace("x", " × ") for b in shown) + " |"]
    lines.append("|---|" + "--:|" * len(shown))
    for variant, title in titles.items():
        cells = []
        for batch in shown:
            row = next((r for r in rows if (r["batch"], r["variant"]) == (batch, variant)), None)
            cells.append("" if row is None else f"{row['ratio']:.3f} ± {(row['high'] - row['low']) / 2:.3f}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    summary = found["summary"]
    most = next((row for row in rows if row["variant"] == "resident_10000"), None)
    said = []
    if most:
        said.append(
            f"10,000 resident adapters take {most['bank_bytes'] / 1e9:.2f} GB and {summary['ratio_10000_vs_1']:.3f} of "
            "the time of one."
        )
    if "swap_ms" in summary:
        said.append(f"A file on disk answers {summary['swap_ms']:.1f} ms later than a resident adapter.")
    if "thrash_2000_vs_8" in summary:
        said.append(
            f"Names drawn from 2,000 within a budget of 256 cost {summary['thrash_2000_vs_8']:.3f} of names drawn from "
            "8 that stay."
        )
    said.append("Reproduce: `ssh-deploy bench bank --shape bert-base` (± half of the 95 % interval).")
    return "\n".join([*lines, "", " ".join(said)])


def family_accuracy_table() -> str:
    """What `examples/family_accuracy.py` measured: four families on three tasks, in four ways of deploying each."""
    found = results("family_accuracy")
    titles = {"ssh": "SSH", "fourierft": "FourierFT", "sdctft": "sDCTFT", "lora": "LoRA r = 8"}
    lines = [
        "| task | family | torch | merged | slots | one mixed bank | all agree | logits from torch | numbers | file |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for task, rows in found["tasks"].items():
        for method, row in rows.items():
            accuracies = " | ".join(f"{row['accuracy'][way]:.4f}" for way in ("torch", "merged", "slots", "mixed"))
            far, size = max(row["from_torch"].values()), f"{row['bytes'] / 1000:.0f} kB"
            tail = f"{row['agreement']:.2%} | {far:.0e} | {row['parameters']:,} | {size}"
            lines.append(f"| {task} | {titles[method]} | {accuracies} | {tail} |")
    many = sum(map(len, found["tasks"].values()))
    said = (
        "Held-out text, one seed each, FourierFT and sDCTFT trained for 2 or 3 epochs where SSH had up to 8: what "
        f"counts is that the ways agree, not who wins. The bank holds all {many}, and rows of all are shuffled into "
        f"batches of {found['batch']}. Torch is PEFT for FourierFT and LoRA, the float64 definition for SSH and "
        "sDCTFT. "
        "Reproduce: `python examples/family_accuracy.py`."
    )
    lines += ["", said]
    return "\n".join(lines)


def training_table() -> str:
    """What `examples/train_adapters.py` measured: SSH beside LoRA, every seed, and the ablation of δ."""
    found = results("train_adapters")
    if not found.get("tasks"):
        return "(not measured yet)"
    head = "| task | method | mean accuracy | each seed | trained, head aside | file, f16 |"
    lines = [head, "|---|---|--:|---|--:|--:|"]
    for task, row in found["tasks"].items():
        for method, title in (("ssh", "SSH"), ("lora", f"LoRA r = {found['settings']['lora_rank']}")):
            one = row[method]
            seeds = ", ".join(f"{value:.4f}" for value in one["test"])
            size = f"{one['bytes'] / 1000:.0f} kB"
            lines.append(f"| {task} | {title} | {one['mean']:.4f} | {seeds} | {one['parameters']:,} | {size} |")
    lines += ["", "Held-out, de-duplicated text. Reproduce: `python examples/train_adapters.py`."]
    lines += found.get("notes", [])
    if "ablation" in found:
        table = found["ablation"]["test"]
        means = (f"δ = {delta}: {sum(v) / len(v):.4f} ({len(v)} seeds)" for delta, v in table.items())
        lines += [f"Share δ of coefficients chosen by energy ({found['ablation']['task']}): {', '.join(means)}."]
    return "\n".join(lines)


def decoder_training_table() -> str:
    """What `examples/train_decoder_adapters.py` measured: held-out perplexity, the effect anyone sees, an answer."""
    found = results("train_decoder_adapters")
    lines = [
        "| adapter | method | perplexity | words | a pirate's | trained | file, f16 |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in found["adapters"].items():
        models = {"none": found["base"][name], "SSH": row["ssh"]}
        if "lora" in row:
            models[f"LoRA r = {found['settings']['lora_rank']}"] = row["lora"]
        for title, one in models.items():
            trained = f"{one['parameters']:,}" if "parameters" in one else ""
            size = f"{row['file']['bytes'] / 1000:.0f} kB" if title == "SSH" else ""
            seen = f"{one['words']:.1f} | {one['pirate']:.0%}"
            lines.append(f"| {name} | {title} | {one['test']:.1f} | {seen} | {trained} | {size} |")
    lines += [
        "",
        "Held-out answers that share no line with training. Reproduce: `python examples/train_decoder_adapters.py`.",
    ]
    return "\n".join(lines)


def decode_table() -> str:
    """What `ssh-deploy bench decode` measured: times of a token beside the plain model, by precision of the base."""
    found = results("bench_decode")
    rows = [row for row in found["results"] if "ratio" in row]
    titles = {
        (1, "off"): "no adapter (bit-identical), one row",
        (1, "on"): "an adapter on query and value, one row",
        (1, "on_all7"): "an adapter on all seven matrices, one row",
        (8, "on"): "eight rows, each its own adapter",
        (1, "on_lora"): "LoRA r = 16 on query and value, one row",
        (8, "on_lora"): "eight rows, each its own LoRA r = 16",
    }
    shown = list(dict.fromkeys(row["precision"] for row in rows))
    head = ["time of a token / plain model's", *(f"{name} base" for name in shown)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * len(shown)]
    for (many, variant), title in titles.items():
        cells = []
        for precision in shown:
            wanted = (precision, variant, many)
            row = next((r for r in rows if (r["precision"], r["variant"], r["rows"]) == wanted), None)
            cells.append("" if row is None else f"{row['ratio']:.3f} ± {(row['high'] - row['low']) / 2:.3f}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    summary, said = found["summary"], []
    if "mixed8_speedup" in summary:
        said.append(f"Eight rows at once write {summary['mixed8_speedup']:.1f}× the tokens of one after another.")
    if "rss_ratio" in summary:
        said.append(f"Eight adapters take {summary['rss_ratio']:.3f} of the base's peak memory.")
    if "peft_speedup" in summary:
        said.append(f"PEFT in torch takes {summary['peft_speedup']:.1f}× the time of a token with an adapter.")
    said.append("SmolLM2-135M's shape, two CPU cores.")
    said.append("Reproduce: `ssh-deploy bench decode` (± half of the 95 % interval).")
    return "\n".join([*lines, "", " ".join(said)])


def transform_table() -> str:
    """What `ssh-deploy bench transform` measured: W += ΔW beside those who make ΔW alone."""
    found = results("bench_transform")
    titles = {
        "ours": "W += ΔW, SSH", "ours_fourier": "W += ΔW, FourierFT", "memcpy": "a copy of W",
        "peft": "ΔW, PEFT's FourierFT", "torch_fft": "ΔW, torch.fft", "scipy": "ΔW, scipy.fft",
    }  # fmt: skip
    rows = {(row["shape"], row["variant"]): row for row in found["results"] if row["dtype"] == "float32"}
    shapes = list(dict.fromkeys(shape for shape, _ in rows))
    lines = ["| ms, float32 | " + " | ".join(shape.replace("x", " × ") for shape in shapes) + " |"]
    lines.append("|---|" + "--:|" * len(shapes))
    for variant, title in titles.items():
        if (shapes[0], variant) in rows:  # scipy is there or not
            lines.append(f"| {title} | " + " | ".join(f"{rows[shape, variant]['ms']:.2f}" for shape in shapes) + " |")
    threads = found["machine"]["threads"]
    said = f"1,000 coefficients, {threads} threads, one interleaved run. Reproduce: `ssh-deploy bench transform`."
    return "\n".join([*lines, "", said])


def merge_table() -> str:
    """What `ssh-deploy bench merge` measured: a merge beside a copy and beside PEFT."""
    found = results("bench_merge")
    titles = {"merge": "`ssh-deploy merge`", "cp + sync": "`cp -r`, `sync -f`", "peft": "PEFT, in memory"}
    lines = ["| bf16 checkpoint | | seconds | own memory, MB | all memory, MB |", "|--:|---|--:|--:|--:|"]
    for row in found["results"]:
        if row["variant"] in titles:
            numbers = f"{row['seconds']:.1f} | {row['anonymous_mb']:,.0f} | {row['peak_mb']:,.0f}"
            lines.append(f"| {row['gigabytes']:g} GB | {titles[row['variant']]} | {numbers} |")
    summary = found["summary"]
    said = (
        f"Query and value of every layer of a LLaMA-3.1-8B shape, until all is on the disk: "
        f"{summary['over_cp']:.2f} of the time of a copy and the transforms, {summary['speedup_vs_peft']:.1f} times "
        f"as fast as PEFT from behind its imports. Reproduce: `ssh-deploy bench merge --gigabytes 4`."
    )
    return "\n".join([*lines, "", said])
