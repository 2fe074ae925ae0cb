"""`bench bank`: what a bank of adapters costs beside the plain model, and beside LoRA on the same matrices.

One adapter a row, off, one for all; 1 to 10,000 resident; a swap from disk; many adapters against a small budget.
The plain model is the same trace without slots, in its own onnxruntime session with the same options; ours runs
through `Deployment.run` with names, so that our own Python is inside. Two sessions of one model differ by 1 to 3 %
for as long as they live (where their weights happen to lie), more than "off" may cost; so base and bank each have
several sessions, rounds go through them in turn, and now and then all are opened anew (`reopening`). Answers are
checked before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import DeploymentError, VerificationError
from ssh_deploy.jobs.bench_models import (
    COEFFICIENTS,
    LORA_BANK,
    Models,
    adapter_files,
    build_models,
    check_shape,
    lora_arrays,
    token_feeds,
)
from ssh_deploy.jobs.benching import Bench, describe_machine, resident_bytes
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.jobs.reopening import ROUNDS, Openings
from ssh_deploy.jobs.timing import LEAST_ROUNDS, Timed, Variant, interleaved, spun_down
from ssh_deploy.runtimes.answers import Adapters
from ssh_deploy.runtimes.bank import inputs_by_kind, row_bytes
from ssh_deploy.runtimes.budget import widths_of
from ssh_deploy.runtimes.deployment import Deployment
from ssh_deploy.runtimes.folder import open_folder
from ssh_deploy.runtimes.session import Session

PARTS = ("ratios", "lora", "resident", "swap", "thrash")
COLUMNS = ("shape", "batch", "variant", "resident", "ms", "ratio", "low", "high", "cpu_ratio", "rounds")
_RANKS = (8, 16)
_MODEL = "model.onnx"
_CLOSE, _APART = 1e-5, 1e-3  # of the largest number of the answer

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class BankOptions:
    """What `bench bank` measures.

    Attributes:
        shapes: of `bench_models.SHAPES`; the summary is of the first.
        batches: (rows, tokens).
        resident: how many adapters, the fewest first; the summary compares the last with the first.
        parts: of `PARTS`.
        seconds: most time for each group of variants.
        sessions: of base and of bank that take turns.
        openings: times at least that they are opened, for a batch.
        threads: of one operator; None: all cores.
        many, few, budget: `thrash`: names drawn from ``many`` or ``few``, with rows for ``budget``.
    """

    shapes: tuple[str, ...] = ("bert-base", "minilm")
    batches: tuple[tuple[int, int], ...] = ((1, 16), (1, 128), (8, 64), (32, 32))
    resident: tuple[int, ...] = (1, 100, 1000, 10_000)
    parts: tuple[str, ...] = PARTS
    seconds: float = 600.0
    sessions: int = 3
    openings: int = 3
    threads: int | None = None
    many: int = 2000
    few: int = 8
    budget: int = 256


def measure_bank(
    work: Path,
    *,
    options: BankOptions | None = None,
    progress: Progress = silent,
    grown: Callable[[Bench], None] = lambda bench: None,
) -> Bench:
    """Measure what ``options`` say, with graphs and adapter files kept under ``work`` for the next time.

    ``grown`` is told after each part, so that nothing measured is lost.

    Raises:
        DeployError: ``work`` cannot be written, a package is missing, or options that fit nothing.
        VerificationError: an answer is wrong: nothing is timed then.
    """
    options = options or BankOptions()
    rows = max(rows for rows, _ in options.batches)
    if options.few > options.budget or rows > options.budget:
        raise DeploymentError(
            f"A budget of {options.budget} adapters for {options.few} that stay and batches of {rows}.",
            hint="Give a budget of at least as many.",
        )
    for shape in options.shapes:
        check_shape(shape)
    bench = Bench("bank", describe_machine(threads=options.threads))
    for shape in options.shapes:
        models = build_models(work, shape, ranks=_RANKS, progress=progress)
        run = _Run(bench, models, work, options, progress)
        for part in PARTS:
            if part in options.parts:
                getattr(run, part)()
                _summarise(bench, options)
                grown(bench)
    return bench


@dataclass(slots=True)
class _Run:
    """The parts of the bench on one shape."""

    bench: Bench
    models: Models
    work: Path
    options: BankOptions
    progress: Progress

    def ratios(self) -> None:
        """Base, every row another adapter, no adapter, one for all; for every batch."""
        most = max(rows for rows, _ in self.options.batches)
        resident = max(LORA_BANK, most)
        files = self._files(resident)

        def opens(stack: ExitStack, form: str) -> Session | Deployment:
            if form == "plain":
                session = Session(self.models.plain, threads=self.options.threads)
                stack.callback(session.close)
                return session
            bank = stack.enter_context(self._deployment(resident))
            _load(bank, files)
            return bank

        for rows, tokens in self.options.batches:
            with Openings[Any](opens, self.options.sessions) as openings:
                plains, banks = openings.of("plain"), openings.of("slots")
                names = [_name(i) for i in range(rows)]
                feeds = token_feeds(plains[0], rows, tokens)
                check_answers(plains[0], banks[0], feeds, names)
                variants = {
                    "base": _plain(plains, feeds),
                    "on": _adapted(banks, feeds, [names]),
                    "off": _adapted(banks, feeds, [None]),
                    "one": _adapted(banks, feeds, names[:1]),
                }
                self._time((rows, tokens), variants, openings, resident={"on": resident, "one": resident})

    def lora(self) -> None:
        """LoRA on the same sites: A and B as inputs for the whole batch, and a bank gathered by id."""
        plain = Session(self.models.plain, threads=self.options.threads)
        sessions = {key: Session(path, threads=self.options.threads) for key, path in self.models.lora.items()}
        arrays = {(rank, form): lora_arrays(self.models.shape, rank, form) for rank, form in sessions}
        for rows, tokens in self.options.batches:
            feeds = token_feeds(plain, rows, tokens)
            given = {key: {**feeds, **own} for key, own in arrays.items()}
            for (_, form), own in given.items():
                if form == "bank":
                    own["lora_ids"] = np.arange(rows, dtype=np.int64) % LORA_BANK
            for rank in _RANKS:
                _check_lora(sessions, arrays, given, rank, feeds)
            variants = {"base": _plain([plain], feeds)}
            for key, session in sessions.items():
                variants[f"lora{key[0]}_{key[1]}"] = _plain([session], given[key])
            self._time((rows, tokens), variants, None)

    def resident(self) -> None:
        """The same batch with few and with many resident, every row another where there are enough.

        With one resident every row names it, and it is lent without ids: the ratio holds all that a full bank costs.
        """
        batch = self._batch((8, 64))
        counts = sorted(set(self.options.resident))
        files = self._files(max(counts))
        folder = open_folder(self.models.slots)
        session = Session(folder.root / _MODEL, threads=self.options.threads)
        feeds = token_feeds(session, *batch)
        rng = np.random.default_rng(0)
        variants: dict[str, Variant] = {}
        facts: dict[str, dict[str, Any]] = {}
        for count in counts:
            widths = widths_of(folder, session.adapter_inputs, max_coefficients=COEFFICIENTS, max_labels=None)
            each = _row_bytes(session, widths)
            before = resident_bytes()
            bank = Deployment(folder, session, budget=count * each, widths=widths)
            _load(bank, files[:count], progress=self.progress)
            grown = resident_bytes() - before
            drawn = [_draw(rng, count, batch[0]) for _ in range(256)]
            name = f"resident_{count}"
            variants[name] = _adapted([bank], feeds, drawn)
            facts[name] = {"resident": count, "bank_bytes": bank.nbytes, "rss_grown": grown}
        for name, timed in self._interleave(variants, f"resident_{counts[0]}", batch).items():
            self._add(batch, name, timed, **facts[name])
        self.bench.results.append({"shape": self.models.shape, "variant": "bytes", "bytes_per_adapter": each})

    def swap(self) -> None:
        """From an adapter file on disk to its first answer, less a run with the adapter resident."""
        batch = self._batch((1, 16))
        files = self._files(max(self.options.many, self.options.budget + 1))
        with self._deployment(self.options.budget) as bank:
            feeds = token_feeds(bank, *batch)
            bank.load("resident", files[0], pin=True)

            def swap(i: int) -> object:
                k = 1 + i % (len(files) - 1)
                bank.load(_name(k), files[k])
                return bank.run(feeds, _name(k))

            variants = {"resident": _adapted([bank], feeds, ["resident"]), "swap": swap}
            timed = self._interleave(variants, "resident", batch)
        for name, one in timed.items():
            self._add(batch, f"swap_{name}" if name != "swap" else name, one, swap_ms=round(one.difference_ms, 4))

    def thrash(self) -> None:
        """Names drawn from many more than the budget holds, beside names drawn from few that stay."""
        batch, options = self._batch((1, 16)), self.options
        files = self._files(options.many)
        with self._deployment(options.budget) as bank:
            feeds = token_feeds(bank, *batch)
            _load(bank, files[: options.many], progress=self.progress)
            rng = np.random.default_rng(0)
            many = [_draw(rng, options.many, batch[0]) for _ in range(4096)]
            few = [_draw(rng, options.few, batch[0]) for _ in range(4096)]
            variants = {
                f"few_{options.few}": _adapted([bank], feeds, few),
                f"many_{options.many}": _adapted([bank], feeds, many),
            }
            timed = self._interleave(variants, f"few_{options.few}", batch)
        for name, one in timed.items():
            self._add(batch, name, one, budget=options.budget)

    def _files(self, count: int) -> list[Path]:
        return adapter_files(self.work, open_folder(self.models.slots), count, progress=self.progress)

    def _batch(self, wanted: tuple[int, int]) -> tuple[int, int]:
        return wanted if wanted in self.options.batches else self.options.batches[0]

    def _deployment(self, adapters: int) -> Deployment:
        """The graph with slots, and a bank of ``adapters`` rows."""
        folder = open_folder(self.models.slots)
        session = Session(folder.root / _MODEL, threads=self.options.threads)
        widths = widths_of(folder, session.adapter_inputs, max_coefficients=COEFFICIENTS, max_labels=None)
        return Deployment(folder, session, budget=adapters * _row_bytes(session, widths), widths=widths)

    def _interleave(
        self,
        variants: Mapping[str, Variant],
        base: str,
        batch: tuple[int, int],
        *,
        before: Mapping[str, Variant] | None = None,
        least: int = LEAST_ROUNDS,
    ) -> dict[str, Timed]:
        stage = f"{self.models.shape} {batch[0]}x{batch[1]} {', '.join(variants)}"
        seconds, progress = self.options.seconds, self.progress
        return interleaved(
            variants, base=base, seconds=seconds, least=least, progress=progress, stage=stage, before=before
        )

    def _time(
        self,
        batch: tuple[int, int],
        variants: Mapping[str, Variant],
        openings: Openings[Any] | None,
        *,
        resident: Mapping[str, int] | None = None,
    ) -> None:
        # of different sessions: each variant finds the machine as it left it itself
        before: dict[str, Variant] = {name: partial(spun_down, variant) for name, variant in variants.items()}
        least = LEAST_ROUNDS
        if openings is not None:
            before, least = openings.before(before, times=self.options.sessions), ROUNDS * self.options.openings
        for name, timed in self._interleave(variants, "base", batch, before=before, least=least).items():
            count = (resident or {}).get(name)
            self._add(batch, name, timed, **({} if count is None else {"resident": count}))

    def _add(self, batch: tuple[int, int], variant: str, timed: Timed, **facts: Any) -> None:
        about = {"shape": self.models.shape, "batch": f"{batch[0]}x{batch[1]}", "variant": variant}
        self.bench.results.append(about | facts | {k: v for k, v in timed.as_dict().items() if k != "name"})


def check_answers(plain: Session, bank: Deployment, feeds: Feeds, names: Sequence[str]) -> None:
    """Off is the plain model bit for bit; every row of a mixed batch is what its adapter answers alone, not the base.

    Raises:
        VerificationError: which row is not.
    """
    base, off, mixed = plain.run(feeds), bank.run(feeds), bank.run(feeds, list(names))
    for key, value in base.items():
        if off[key].tobytes() != value.tobytes():
            raise VerificationError(f"{key}: no adapter is not the plain model.", hint="Report this graph.")
        scale = float(np.abs(mixed[key]).max())
        for row, name in enumerate(names):
            own = {k: array[row : row + 1] for k, array in feeds.items()}
            alone = bank.run(own, name)[key][0]
            if np.abs(alone - mixed[key][row]).max() > _CLOSE * scale:
                raise VerificationError(f"{key}: row {row} is not what {name} answers alone.", hint="Report this.")
            if np.abs(mixed[key][row] - value[row]).max() < _APART * scale:
                raise VerificationError(f"{key}: row {row} with {name} answers as the base.", hint="Report this.")


def _check_lora(
    sessions: Mapping[tuple[int, str], Session],
    arrays: Mapping[tuple[int, str], Feeds],
    given: Mapping[tuple[int, str], Feeds],
    rank: int,
    feeds: Feeds,
) -> None:
    """The peer's bank gives each row what the peer's inputs give it alone, and that is not the base's answer."""
    mixed = sessions[rank, "bank"].run(given[rank, "bank"])
    base = sessions[rank, "bank"].run(feeds)
    for row, adapter in enumerate(given[rank, "bank"]["lora_ids"].tolist()):
        own = {k: array[row : row + 1] for k, array in feeds.items()}
        own |= {k: array[adapter] for k, array in arrays[rank, "bank"].items()}
        for key, value in sessions[rank, "inputs"].run(own).items():
            if np.abs(value[0] - mixed[key][row]).max() > _CLOSE * float(np.abs(value).max()):
                raise VerificationError(f"LoRA r={rank}: row {row} of the peer's bank is wrong.", hint="Report this.")
            if np.abs(value[0] - base[key][row]).max() < _APART * float(np.abs(value).max()):
                raise VerificationError(f"LoRA r={rank}: row {row} answers as the base.", hint="Report this.")


def _summarise(bench: Bench, options: BankOptions) -> None:
    shape = options.shapes[0]
    rows = [row for row in bench.results if row["shape"] == shape]

    def find(variant: str, key: str, batch: str | None = None) -> Any:
        return next((r[key] for r in rows if r["variant"] == variant and batch in (None, r.get("batch"))), None)

    off = [row["ratio"] for row in rows if row["variant"] == "off"]
    first, last = min(options.resident), max(options.resident)
    found = {
        **{f"ratio_on_{b}": find("on", "ratio", b) for b in (f"{r}x{t}" for r, t in options.batches)},
        "ratio_off": max(off, default=None),
        f"ratio_{last}_vs_{first}": find(f"resident_{last}", "ratio"),
        f"thrash_{options.many}_vs_{options.few}": find(f"many_{options.many}", "ratio"),
        "bytes_per_adapter": find("bytes", "bytes_per_adapter"),
        "swap_ms": find("swap", "swap_ms"),
        **{f"lora{rank}_on_8x64": find(f"lora{rank}_bank", "ratio", "8x64") for rank in _RANKS},
    }
    bench.summary |= {key: value for key, value in found.items() if value is not None}


def _plain(sessions: Sequence[Session], feeds: Feeds) -> Variant:
    """Round ``i`` runs the ``i``-th session, in turn."""
    return lambda i: sessions[i % len(sessions)].run(feeds)


def _adapted(banks: Sequence[Deployment], feeds: Feeds, adapters: Sequence[Adapters]) -> Variant:
    """Round ``i`` runs the ``i``-th of ``adapters``; in k² rounds each deployment meets each session of `_plain`."""
    turns = len(banks)
    return lambda i: banks[(i + i // turns) % turns].run(feeds, adapters[i % len(adapters)])


def _load(bank: Deployment, files: Sequence[Path], *, progress: Progress = silent) -> None:
    for i, path in enumerate(files):
        bank.load(_name(i), path)
        progress("load adapters", i + 1, len(files))


def _draw(rng: np.random.Generator, count: int, rows: int) -> list[str]:
    """Names of one batch: different ones where there are enough."""
    return [_name(int(i)) for i in rng.choice(count, rows, replace=count < rows)]


def _name(i: int) -> str:
    return f"a{i:05d}"


def _row_bytes(session: Session, widths: Mapping[str, int]) -> int:
    """Bytes of one adapter's row over all banks; the graphs have no heads."""
    return sum(row_bytes(entries, widths) for entries in inputs_by_kind(session.adapter_inputs.values()).values())
