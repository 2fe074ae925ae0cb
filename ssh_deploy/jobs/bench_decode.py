"""`bench decode`: what adapters cost a language model that answers token by token, beside LoRA and PEFT in torch.

Everything runs through `Deployment.generator`, requests with names, the base too (the plain export, without slots);
one step is timed, of rows that were filled anew right before and brought to the same length. Sessions take turns, are
opened anew (`reopening`), and a variant runs untimed before it is timed, as in `bench_bank`. Answers are checked
before anything is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssh_deploy.errors import DependencyError, DeploymentError, UnknownNameError, near_misses
from ssh_deploy.jobs.benching import Bench, describe_machine
from ssh_deploy.jobs.decode_rows import Rows, check_rows, run_on
from ssh_deploy.jobs.decoder_models import PRECISIONS, RANK, Decoders, find_decoders
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.jobs.reopening import ROUNDS, Openings
from ssh_deploy.jobs.timing import Timed, Variant, interleaved
from ssh_deploy.jobs.torch_decoding import TorchDecoder
from ssh_deploy.runtimes.deployment import Deployment

PARTS = ("decode", "mixed", "prefill", "speedup", "lora", "peft", "memory")
COLUMNS = ("precision", "variant", "rows", "tokens", "ms", "tokens_per_s", "ratio", "low", "high", "rounds", "peak_mb")


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """What `bench decode` measures.

    Attributes:
        shape: of `decoder_models.SHAPES`, where no base is given.
        precisions: of `decoder_models.PRECISIONS`.
        parts: of `PARTS`.
        rows: of the mixed batch, each with its own adapter.
        context: tokens of the prompt before the ones that are timed.
        prompt: tokens of the prompt that is timed.
        seconds: most time for each group of variants.
        sessions: of the base and of ours that take turns.
        openings: times at least that they are opened, for one row or a batch of a precision.
        threads: of one operator; None: all cores.
    """

    shape: str = "smollm2-135m"
    precisions: tuple[str, ...] = PRECISIONS
    parts: tuple[str, ...] = PARTS
    rows: int = 8
    context: int = 32
    prompt: int = 64
    seconds: float = 120.0
    sessions: int = 2
    openings: int = 3
    threads: int | None = None

    def check(self) -> None:
        """Refuse names that nothing goes by.

        Raises:
            UnknownNameError: with the near ones.
        """
        for given, known in ((self.parts, PARTS), (self.precisions, PRECISIONS)):
            for name in given:
                if name not in known:
                    raise UnknownNameError(f"bench decode knows no {name!r}.", hint=near_misses(name, known))


def measure_decode(
    work: Path,
    *,
    base: str | Path | None = None,
    options: DecodeOptions | None = None,
    progress: Progress = silent,
    grown: Callable[[Bench], None] = lambda bench: None,
) -> Bench:
    """Measure what ``options`` say on ``base``, with exports and adapters kept under ``work`` for the next time.

    ``grown`` is told after each part, so that nothing measured is lost.

    Raises:
        DeployError: ``work`` cannot be written, a package is missing, a base that is no decoder.
        VerificationError: an answer is wrong: nothing is timed then.
    """
    options = options or DecodeOptions()
    options.check()
    models = find_decoders(work, base=base, shape=options.shape, progress=progress)
    bench = Bench("decode", describe_machine(threads=options.threads))
    run = _Run(bench, models, options, progress)
    for precision in options.precisions:
        for part in PARTS:
            if part in options.parts and (precision == "f32" or part not in ("speedup", "lora", "peft", "memory")):
                getattr(run, part)(precision)
                _summarise(bench, options)
                grown(bench)
    return bench


@dataclass(slots=True)
class _Run:
    """The parts of the bench."""

    bench: Bench
    models: Decoders
    options: DecodeOptions
    progress: Progress

    def decode(self, precision: str) -> None:
        """One row, one token: base, no adapter, an adapter; in float32 also on all seven sites."""
        forms = {"base": "plain", "off": "qv", "on": "qv"} | ({"on_all7": "all7"} if precision == "f32" else {})
        self._group(precision, forms, rows=1, tokens=self.options.context)

    def mixed(self, precision: str) -> None:
        """As many rows as adapters, one token each: base, no adapter, each its own."""
        self._group(precision, {"base": "plain", "off": "qv", "on": "qv"}, rows=self.options.rows)

    def prefill(self, precision: str) -> None:
        """One prompt: base, no adapter, an adapter."""
        forms = {"base": "plain", "off": "qv", "on": "qv"}
        self._group(precision, forms, rows=1, tokens=self.options.prompt, reading=True)

    def lora(self, precision: str) -> None:
        """LoRA of rank `RANK` in the same places, in slots of its own, for one row and for all."""
        for rows in (1, self.options.rows):
            self._group(precision, {"base": "plain", "on_lora": "lora"}, rows=rows)

    def speedup(self, precision: str) -> None:
        """A batch of many adapters against one row of one adapter."""
        names, tokens = _names(self.options.rows), self.options.context
        with self._openings(precision) as openings:
            rows = {"one": run_on(openings, "qv", names[:1], tokens), "together": run_on(openings, "qv", names, tokens)}
            self._time(precision, rows, openings, base="one", tokens=tokens)

    def peft(self, precision: str) -> None:
        """PEFT's LoRA in torch, one row, one token, against ours with an adapter on."""
        tokens = self.options.context
        with self._openings(precision) as openings:
            ours = run_on(openings, "qv", _names(1), tokens)
            try:
                torch = TorchDecoder(self.models.checkpoint, tokens=tokens, threads=self.options.threads)
            except DependencyError as error:
                self.bench.notes.append(f"no peft: {error.what}")
                return
            variants: dict[str, Variant] = {"onnx": ours.step, "peft": torch.step}
            before: dict[str, Variant] = {"onnx": ours.ready_to_decode, "peft": torch.ready}
            timed = self._interleave(precision, variants, before, openings, base="onnx")
            for name, one in timed.items():
                self._add(precision, name, one, rows=1, tokens=tokens, made=1)

    def memory(self, precision: str) -> None:
        """Most memory of a process that opens, loads and generates: the base, and as many adapters as rows."""
        for variant, form in (("base", "plain"), ("on", "qv")):
            count = self.options.rows
            files = self.models.adapters(form, precision, count) if form == "qv" else []
            peak = peak_bytes(self.models.folder(form, precision), files, rows=count, options=self.options)
            self.bench.results.append(
                {"precision": precision, "variant": f"memory_{variant}", "rows": count, "peak_mb": round(peak / 1e6, 1)}
            )

    def _group(
        self,
        precision: str,
        forms: Mapping[str, str],
        *,
        rows: int,
        tokens: int | None = None,
        reading: bool = False,
    ) -> None:
        """Time variants, each on the exports of its form; those named ``on…`` with an adapter for each row."""
        tokens = tokens or self.options.context
        with self._openings(precision) as openings:
            made = {
                name: run_on(
                    openings,
                    form,
                    _names(rows) if name.startswith("on") else [None] * rows,
                    tokens,
                    stride=1 if form == "plain" else 2,
                )
                for name, form in forms.items()
            }
            check_rows(made["base"].deployments[0], made, precision)
            self._time(precision, made, openings, base="base", tokens=tokens, reading=reading)

    def _openings(self, precision: str) -> Openings[Deployment]:
        return Openings(lambda stack, form: self._open(stack, precision, form), self.options.sessions)

    def _open(self, stack: ExitStack, precision: str, form: str) -> Deployment:
        # rank is of LoRA, coefficients of spectra: each form has one of the two
        options: dict[str, Any] = {"threads": self.options.threads, "max_coefficients": 750, "max_rank": RANK}
        deployment = stack.enter_context(Deployment.open(self.models.folder(form, precision), **options))
        if form != "plain":
            paths = self.models.adapters(form, precision, self.options.rows)
            for name, path in zip(_names(self.options.rows), paths, strict=True):
                deployment.load(name, path)
        return deployment

    def _time(
        self,
        precision: str,
        rows: Mapping[str, Rows],
        openings: Openings[Deployment],
        *,
        base: str,
        tokens: int,
        reading: bool = False,
    ) -> None:
        variants: dict[str, Variant] = {name: one.step for name, one in rows.items()}
        before: dict[str, Variant] = {
            name: one.ready_to_read if reading else one.ready_to_decode for name, one in rows.items()
        }
        for name, timed in self._interleave(precision, variants, before, openings, base=base).items():
            count = len(rows[name].adapters)
            made = count * (tokens if reading else 1)
            self._add(precision, f"read_{name}" if reading else name, timed, rows=count, tokens=tokens, made=made)

    def _interleave(
        self,
        precision: str,
        variants: Mapping[str, Variant],
        before: Mapping[str, Variant],
        openings: Openings[Deployment],
        *,
        base: str,
    ) -> dict[str, Timed]:
        return interleaved(
            variants,
            base=base,
            seconds=self.options.seconds,
            least=ROUNDS * self.options.openings,
            progress=self.progress,
            stage=f"{precision} {', '.join(variants)}",
            before=openings.before(before, times=2 * self.options.sessions),
        )

    def _add(self, precision: str, variant: str, timed: Timed, *, rows: int, tokens: int, made: int) -> None:
        about = {"precision": precision, "variant": variant, "rows": rows, "tokens": tokens}
        speed = {"tokens_per_s": round(1e3 * made / timed.ms, 2)}
        self.bench.results.append(about | speed | {k: v for k, v in timed.as_dict().items() if k != "name"})


def peak_bytes(folder: Path, adapters: Sequence[Path], *, rows: int, options: DecodeOptions) -> int:
    """Most resident memory, in bytes, of a new process that generates 16 tokens for ``rows`` rows with ``adapters``.

    Raises:
        DeploymentError: the process failed; says why.
    """
    asked = {
        "folder": str(folder), "adapters": [str(path) for path in adapters], "rows": rows,
        "context": options.context, "threads": options.threads,
    }  # fmt: skip
    done = subprocess.run(  # noqa: S603 - this very interpreter
        [sys.executable, "-c", _PROBE, json.dumps(asked)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DeploymentError(f"The measured process failed: {done.stderr.strip()[-400:]}", hint="Is there memory?")
    return int(done.stdout)


_PROBE = """
import json, pathlib, resource, sys
from ssh_deploy import Deployment
asked = json.loads(sys.argv[1])
with Deployment.open(asked["folder"], threads=asked["threads"], max_coefficients=750) as deployment:
    names = [f"a{i}" for i in range(len(asked["adapters"]))]
    for name, path in zip(names, asked["adapters"]):
        deployment.load(name, path)
    prompts = [[5 + row] * asked["context"] for row in range(asked["rows"])]
    deployment.generate(prompts, names or None, max_new_tokens=16, ignore_eos=True)
try:  # what getrusage says on Linux counts the parent's memory before exec, too
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    print(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _names(count: int) -> list[str]:
    return [f"a{i}" for i in range(count)]


def _summarise(bench: Bench, options: DecodeOptions) -> None:
    def find(precision: str, variant: str, key: str, rows: int) -> Any:
        found = (r for r in bench.results if (r["precision"], r["variant"], r["rows"]) == (precision, variant, rows))
        return next((row.get(key) for row in found), None)

    many = options.rows
    together = find("f32", "together", "ratio", many)
    base, ours = (find("f32", f"memory_{name}", "peak_mb", many) for name in ("base", "on"))
    found = {
        **{f"on_{p}": find(p, "on", "ratio", 1) for p in PRECISIONS},
        "on_all7_f32": find("f32", "on_all7", "ratio", 1),
        "off_f32": find("f32", "off", "ratio", 1),
        **{f"mixed{many}_on_{p}": find(p, "on", "ratio", many) for p in PRECISIONS},
        f"mixed{many}_speedup": None if together is None else round(many / together, 4),
        "prefill_on_f32": find("f32", "read_on", "ratio", 1),
        f"lora{RANK}_f32": find("f32", "on_lora", "ratio", 1),
        f"mixed{many}_lora{RANK}_f32": find("f32", "on_lora", "ratio", many),
        "rss_ratio": None if not base or not ours else round(ours / base, 4),
        "peft_speedup": find("f32", "peft", "ratio", 1),
    }
    bench.summary |= {key: value for key, value in found.items() if value is not None}
