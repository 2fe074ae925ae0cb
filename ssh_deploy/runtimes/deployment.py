"""`Deployment`: an exported folder that answers, each row with its own adapter, while adapters come and go.

    with Deployment.open("OUT") as deployment:
        deployment.load("mine", "mine.safetensors")
        deployment.predict(["How far is it?", "WIN a prize"], adapters=["trec", "mine"])

**Never another adapter's answer.** A name that is not there is an error, not the base; so is a file that changed
since it was exported, an adapter of another base, a row without a head. Which adapters a batch uses is settled
under one lock, and their rows stay untouched until its run has ended (`bank`). ONNX Runtime reads arrays that the
deployment owns; nothing is lent whose lifetime ORT would have to guard.

**What it costs.** A run feeds a few arrays by reference (µs, whatever the number of resident adapters) and looks at
each adapter's file once (a ``stat``), so that a changed file is a new adapter. Loading is one file read and one row
written. Adapters take at most ``memory``; the longest idle are evicted and read again at their next use.
Importing this module imports neither torch, transformers nor onnx.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import DeploymentError
from ssh_deploy.runtimes.answers import Adapters, Prediction, joined, names_per_row, prediction
from ssh_deploy.runtimes.bank import GUARD
from ssh_deploy.runtimes.budget import DEFAULT_MEMORY, HowManyFit, how_many_fit, make_banks, parse_bytes, widths_of
from ssh_deploy.runtimes.catalogue import Catalogue
from ssh_deploy.runtimes.folder import MODEL, Folder, check_name, contained, open_folder
from ssh_deploy.runtimes.generator import Generator
from ssh_deploy.runtimes.lending import Part, lent_to, nothing_lent
from ssh_deploy.runtimes.loading import Loaded, prepare
from ssh_deploy.runtimes.prompts import Prompts
from ssh_deploy.runtimes.requests import Generation
from ssh_deploy.runtimes.residents import Residents
from ssh_deploy.runtimes.session import Input, Session
from ssh_deploy.runtimes.texts import Texts

LOGITS = "logits"
HIDDEN = "last_hidden_state"
CLASSIFY, EMBED = "text-classification", "feature-extraction"


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """An adapter this deployment can answer with.

    ``state``: ``resident``; ``stored`` (in the folder) or ``evicted`` (loaded from elsewhere), read again at the next
    use; or ``unloaded``, refused until it is loaded again. ``verified``: True
    when its fingerprint matched the base's, False for "base unverified", None when the folder does not say.
    """

    name: str
    state: str
    family: str
    labels: tuple[str, ...]
    task: str | None
    digest: str
    verified: bool | None


class Deployment:
    """An exported folder, open. All methods are safe from several threads."""

    def __init__(self, folder: Folder, session: Session, *, budget: int, widths: Mapping[str, int]) -> None:
        """Use `Deployment.open`."""
        guard = session.adapter_inputs.get(GUARD)
        shape = None if guard is None else tuple(guard.shape)
        if shape != folder.guard:
            raise DeploymentError(
                f"{folder.root}: {MODEL} has guard {shape}, deployment.json says {folder.guard}.",
                hint="The two are of different exports: export again.",
            )
        self.folder = folder
        self._session = session
        inputs = session.adapter_inputs
        banks = make_banks(folder, inputs, widths, budget, upload=session.upload)
        self._residents = Residents(banks, budget=budget)
        self._catalogue = Catalogue(folder, inputs, self._residents)
        prepare(folder)
        self._texts: Texts | None = None
        self._texts_lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        memory: int | str = DEFAULT_MEMORY,
        max_coefficients: int | None = None,
        max_labels: int | None = None,
        max_rank: int | None = None,
        providers: Sequence[str] | None = None,
    ) -> Deployment:
        """Open the folder that ``ssh-deploy export --onnx`` wrote.

        Args:
            path: the folder.
            threads: of one operator; None lets ONNX Runtime use all cores.
            memory: bytes, or text such as ``512MiB``, that resident adapters and their heads may take. It is reserved
                now and taken from the system as adapters are loaded.
            max_coefficients: n of the widest adapter that may be loaded; every resident adapter takes that much room.
                None: that of the folder's widest, 1,024 when it has none.
            max_labels: of the widest head that may be loaded, likewise; None: the folder's widest, at least 16.
            max_rank: of low-rank adapters and reflections, likewise; None: the folder's highest, 16 when it has none.
            providers: ONNX Runtime's execution providers; None takes CUDA where it is there, else the CPU.

        Raises:
            DeploymentError: no exported folder, a damaged one, one of an unknown contract, or less ``memory`` than
                one adapter takes.
            DependencyError: onnxruntime is not installed.
        """
        budget = parse_bytes(memory)
        folder = open_folder(path)
        session = Session(contained(folder.root, MODEL), threads=threads, providers=providers)
        inputs = session.adapter_inputs
        widths = widths_of(folder, inputs, max_coefficients=max_coefficients, max_labels=max_labels, max_rank=max_rank)
        return cls(folder, session, budget=budget, widths=widths)

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model and all adapters; later calls are refused."""
        self._closed = True
        self._texts = None
        self._catalogue.close()
        self._residents = Residents({}, budget=0)  # runs that go on keep what they were lent
        self._catalogue = Catalogue(self.folder, {}, self._residents)
        self._session.close()

    @property
    def adapters(self) -> dict[str, AdapterEntry]:
        """Adapters by name: those of the folder and those loaded."""
        known = self._catalogue.table()
        return {name: self._entry(name, known.get(name)) for name in [*self.folder.adapters, *known]}

    @property
    def inputs(self) -> Mapping[str, Input]:
        """The model's own inputs, which `run` takes."""
        return self._session.inputs

    @property
    def adapter_inputs(self) -> Mapping[str, Input]:
        """The graph's inputs for adapters, which the deployment feeds."""
        return self._session.adapter_inputs

    @property
    def nbytes(self) -> int:
        """Bytes that resident adapters take, heads included."""
        return self._residents.used

    def how_many_fit(self) -> HowManyFit:
        """Bytes of an adapter and of a head, how many the budget holds, and how many there are."""
        return how_many_fit(self._residents)

    def load(self, name: str, path: str | Path | None = None, *, pin: bool = False) -> AdapterEntry:
        """Make an adapter resident: one of the folder, or a file under a new name or in place of an older one.

        Once it returns, ``name`` never answers from other content; runs that go on finish with what they began with.

        Args:
            name: 1 to 128 of ``A-Z a-z 0-9 . _ -``.
            path: an ``.onnx_adapter`` made for this folder, a compact file or a PEFT folder; None: the folder's own,
                or the path loaded before.
            pin: as `pin` does.

        Raises:
            UnknownNameError: no such name in the folder, or no name at all.
            DeploymentError: the name is one of the folder's, a file that changed since it was exported, or no room
                beside what is pinned.
            AdapterFileError, AdapterMismatchError, FingerprintError: a broken, foreign or too wide adapter.
        """
        self._check_open()
        self._catalogue.load(check_name(name), None if path is None else Path(path), pin=pin)
        return self._entry(name, self._catalogue.known(name))

    def unload(self, name: str, *, timeout: float | None = None) -> None:
        """Forget an adapter: new requests are refused at once, and its memory is freed when its runs have ended.

        Args:
            name: resident or evicted.
            timeout: seconds to wait for its runs; None: as long as they take.

        Raises:
            UnknownNameError: not loaded.
            DeploymentError: still in use after ``timeout``; it stays loaded.
        """
        self._check_open()
        self._catalogue.unload(check_name(name), timeout=timeout)

    def pin(self, name: str) -> None:
        """Make an adapter resident and never evict it.

        Raises:
            UnknownNameError: no such name. Else as `load`.
        """
        self._check_open()
        self._catalogue.pin(check_name(name), pinned=True)

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again.

        Raises:
            UnknownNameError: no such name.
        """
        self._check_open()
        self._catalogue.pin(check_name(name), pinned=False)

    def predict(self, texts: Sequence[str], adapters: Adapters = None, *, batch_size: int = 32) -> list[Any]:
        """Answer texts, each with its own adapter.

        Args:
            texts: one row each.
            adapters: a name for all, a list of one name (or None, the base) per text, or None for the base. A name
                may be a sum, ``"spam+0.5*style"`` (`sums`).
            batch_size: most rows of one run.

        Returns:
            A `Prediction` per text for text classification; for feature extraction its last hidden state,
            float32 [tokens, hidden], special tokens included and padding cut off.

        Raises:
            UnknownNameError: an adapter that is not there or was unloaded.
            DeploymentError: a row without a head (no adapter on a base that has none), a model that texts do not
                feed, or logits that are no numbers.
        """
        if isinstance(texts, str):
            raise DeploymentError("predict takes a list of texts, not one text.", hint="Put it in a list: [text].")
        if self.folder.task not in (CLASSIFY, EMBED):
            raise DeploymentError(
                f"{self.folder.root}: a {self.folder.task} model does not answer texts as a whole.",
                hint="Let it go on from them: `.generate(prompts, adapters)`, `ssh-deploy run --prompt`."
                if self.folder.decoder
                else "Give arrays: `.run(feeds, adapters=…)`.",
            )
        names = names_per_row(adapters, len(texts))
        answer = self._classify if self.folder.task == CLASSIFY else self._embed
        results: list[Any] = []
        for start in range(0, len(texts), batch_size):
            results += answer(texts[start : start + batch_size], names[start : start + batch_size])
        return results

    def generator(self, *, rows: int = 32, padding: str = "left") -> Generator:
        """A batch that requests for text join and leave, each with its own adapter (`generator`).

        Args:
            rows: most requests in the batch; others wait in line.
            padding: where prompts that join together are filled up to the longest, ``left`` or ``right``; some models
                leave no choice.

        Raises:
            DeploymentError: a model that does not go on from prompts.
        """
        self._check_open()
        return Generator(
            self.folder,
            self._session,
            self._catalogue,
            self._residents,
            prompts=self._prompts,
            rows=rows,
            padding=padding,
        )

    def generate(
        self, prompts: Sequence[str | Sequence[int]], adapters: Adapters = None, *, rows: int = 32, **options: Any
    ) -> list[Generation]:
        """Go on from prompts, each with its own adapter.

        Args:
            prompts: texts, or tokens.
            adapters: as in `predict`.
            rows: most prompts at a time.
            options: of `Generator.submit`, the same for all.

        Raises:
            DeployError: what `Generator.submit` raises, or the failure of any of them.
        """
        if isinstance(prompts, str):
            raise DeploymentError("generate takes a list of prompts, not one.", hint="Put it in a list: [prompt].")
        names = names_per_row(adapters, len(prompts))
        with self.generator(rows=rows) as generator:
            pairs = zip(prompts, names, strict=True)
            streams = [generator.submit(prompt, name, **options) for prompt, name in pairs]
            return [stream.result() for stream in streams]

    def run(
        self, feeds: Mapping[str, NDArray[Any]], adapters: Adapters = None, *, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Answer arrays: the model's own inputs, whose first side is the batch.

        In a batch of heads of different sizes, logits beyond a row's own labels are −∞.

        Args:
            feeds: by input name.
            adapters: as in `predict`.
            outputs: names to compute, None for all.

        Raises:
            UnknownNameError: an adapter that is not there or was unloaded.
            DeploymentError: feeds the model does not take, or rows without a head among rows with one.
        """
        self._check_open()
        strange = sorted(set(feeds) - set(self._session.inputs))
        if strange or set(feeds) != set(self._session.inputs):
            raise DeploymentError(
                f"The model takes {', '.join(self._session.inputs)}; given is {', '.join(feeds) or 'nothing'}.",
                hint="Adapters are given by name, never as feeds." if strange else "Feed all of them.",
            )
        arrays = {name: np.asarray(array) for name, array in feeds.items()}
        batches = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
        if len(set(batches.values())) != 1:
            raise DeploymentError(f"First sides of the feeds differ: {batches}.", hint="They are the batch.")
        names = names_per_row(adapters, batches[next(iter(batches))])
        return self._answer(arrays, names, outputs or self._session.outputs)[0]

    def _classify(self, texts: Sequence[str], names: list[str | None]) -> list[Prediction]:
        feeds, _ = self._tokens().feeds(texts)
        answers, labels = self._answer(feeds, names, [LOGITS], headed=True)
        rows = zip(answers[LOGITS], labels, names, strict=True)
        return [prediction(row[: len(own)], own, who=name or self.folder.base) for row, own, name in rows]

    def _embed(self, texts: Sequence[str], names: list[str | None]) -> list[NDArray[np.float32]]:
        feeds, mask = self._tokens().feeds(texts)
        hidden = self._answer(feeds, names, [HIDDEN])[0][HIDDEN]
        return [row[keep] for row, keep in zip(hidden, mask, strict=True)]

    def _answer(
        self,
        feeds: Mapping[str, NDArray[Any]],
        names: list[str | None],
        outputs: Sequence[str],
        *,
        headed: bool = False,
    ) -> tuple[dict[str, NDArray[Any]], list[tuple[str, ...]]]:
        """Outputs of one batch, and the labels of each row's head; ``headed``: refuse a row without one."""
        self._check_open()
        residents = self._residents
        with self._catalogue.lend(names) as held:
            contents = [None if name is None else held[name] for name in names]
            lent = lent_to(names, contents, residents.banks, self.folder, logits=LOGITS in outputs, headed=headed)
            answers = [self._run_part(feeds, part, outputs) for part in lent.parts]
        if len(answers) == 1:
            return answers[0], lent.labels
        order = np.argsort(np.concatenate([part.rows for part in lent.parts]))
        return {name: joined([a[name] for a in answers])[order] for name in outputs}, lent.labels

    def _run_part(
        self, feeds: Mapping[str, NDArray[Any]], part: Part, outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        base = nothing_lent(self.folder, self._residents.banks)
        own = {name: array[part.rows] for name, array in feeds.items()}
        answers = self._session.run(base | own | part.feeds, outputs)
        if part.labels is not None and LOGITS in answers:  # a bank's heads are as wide as its widest may be
            answers[LOGITS] = answers[LOGITS][..., : part.labels]
        return answers

    def _entry(self, name: str, known: tuple[Loaded, bool] | None) -> AdapterEntry:
        stored = self.folder.adapters.get(name)
        if known is not None:
            loaded, resident = known
            state = "resident" if resident else "evicted" if stored is None else "stored"
            return AdapterEntry(name, state, loaded.family, loaded.labels, loaded.task, loaded.digest, loaded.verified)
        if stored is None:  # another thread unloaded it just now
            raise self._catalogue.absent(name)
        state = "unloaded" if name in self._catalogue.unloaded else "stored"
        labels = stored.labels or self.folder.labels
        return AdapterEntry(name, state, stored.family, labels, stored.task, stored.sha256, stored.verified)

    @cached_property
    def _prompts(self) -> Prompts:
        return Prompts(self.folder)

    def _tokens(self) -> Texts:
        self._check_open()
        with self._texts_lock:
            if self._texts is None:
                self._texts = Texts(self.folder, self._session.inputs)
            return self._texts

    def _check_open(self) -> None:
        if self._closed:
            raise DeploymentError(f"{self.folder.root}: this deployment was closed.", hint="Open it again.")
