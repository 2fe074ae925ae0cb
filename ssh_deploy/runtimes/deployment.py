"""`Deployment`: an exported folder that answers, each row with its own adapter, while adapters come and go.

    with Deployment.open("OUT") as deployment:
        deployment.load("mine", "mine.safetensors")
        deployment.predict(["How far is it?", "WIN a prize"], adapters=["trec", "mine"])

**Never another adapter's answer.** A name that is not there is an error, not the base; so is a file that changed
since it was exported, an adapter of another base, a row without a head. Which adapters a batch uses is settled
under one lock, and their rows stay untouched until its run has ended (`bank`). ONNX Runtime reads arrays that the
deployment owns; nothing is lent whose lifetime ORT would have to guard.

**What it costs.** A run feeds a few arrays by reference (µs, whatever the number of resident adapters). Loading is
one file read and one row written. Importing this module imports neither torch, transformers nor onnx.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import DeploymentError
from ssh_deploy.runtimes.answers import Adapters, Prediction, joined, names_per_row, prediction
from ssh_deploy.runtimes.bank import GUARD
from ssh_deploy.runtimes.folder import MODEL, Folder, check_name, contained, open_folder
from ssh_deploy.runtimes.residents import Part, Residents
from ssh_deploy.runtimes.session import Session
from ssh_deploy.runtimes.texts import Texts

LOGITS = "logits"
HIDDEN = "last_hidden_state"
CLASSIFY, EMBED = "text-classification", "feature-extraction"


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """An adapter this deployment can answer with.

    ``state``: ``resident``, ``stored`` (in the folder, loaded at first use) or ``unloaded``. ``verified``: True
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

    def __init__(self, folder: Folder, session: Session, *, max_coefficients: int) -> None:
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
        self._residents = Residents(folder, session, max_width=max_coefficients)
        self._texts: Texts | None = None
        self._texts_lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        max_coefficients: int = 16_384,
        providers: Sequence[str] | None = None,
    ) -> Deployment:
        """Open the folder that ``ssh-deploy export --onnx`` wrote.

        Args:
            path: the folder.
            threads: of one operator; None lets ONNX Runtime use all cores.
            max_coefficients: widest spectrum that may be loaded; every resident adapter takes that much room.
            providers: ONNX Runtime's execution providers; None takes CUDA where it is there, else the CPU.

        Raises:
            DeploymentError: no exported folder, a damaged one, or one of an unknown contract.
            DependencyError: onnxruntime is not installed.
        """
        folder = open_folder(path)
        session = Session(contained(folder.root, MODEL), threads=threads, providers=providers)
        return cls(folder, session, max_coefficients=max_coefficients)

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model and all adapters; later calls are refused."""
        self._closed = True
        self._texts = None
        self._residents = Residents(self.folder, self._session, max_width=0)
        self._session.close()

    @property
    def adapters(self) -> dict[str, AdapterEntry]:
        """Adapters by name: those of the folder and those loaded."""
        entries = {
            name: AdapterEntry(
                name=name,
                state="unloaded" if name in self._residents.unloaded else "stored",
                family=stored.family,
                labels=stored.labels or self.folder.labels,
                task=stored.task,
                digest=stored.sha256,
                verified=stored.verified,
            )
            for name, stored in self.folder.adapters.items()
        }
        for name, loaded in self._residents.table().items():
            entries[name] = AdapterEntry(
                name, "resident", loaded.family, loaded.labels, loaded.task, loaded.digest, loaded.verified
            )
        return entries

    @property
    def nbytes(self) -> int:
        """Bytes that resident adapters take."""
        return self._residents.nbytes

    def load(self, name: str, path: str | Path | None = None) -> AdapterEntry:
        """Make an adapter resident: one of the folder, or a file under a new name.

        Args:
            name: 1 to 128 of ``A-Z a-z 0-9 . _ -``.
            path: an ``.onnx_adapter`` made for this folder, a compact file or a PEFT folder; None: the folder's own.

        Raises:
            UnknownNameError: no such name in the folder, or no name at all.
            DeploymentError: the name is taken by something else, or a file that changed since it was exported.
            AdapterFileError, AdapterMismatchError, FingerprintError: a broken or foreign adapter.
        """
        self._check_open()
        self._residents.load(check_name(name), None if path is None else Path(path))
        return self.adapters[name]

    def unload(self, name: str) -> None:
        """Forget a resident adapter and free its row; running batches finish with it, later ones are refused.

        Raises:
            UnknownNameError: not resident.
        """
        self._check_open()
        self._residents.unload(check_name(name))

    def predict(self, texts: Sequence[str], adapters: Adapters = None, *, batch_size: int = 32) -> list[Any]:
        """Answer texts, each with its own adapter.

        Args:
            texts: one row each.
            adapters: a name for all, a list of one name (or None, the base) per text, or None for the base.
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
                hint="Give arrays: `.run(feeds, adapters=…)`.",
            )
        names = names_per_row(adapters, len(texts))
        answer = self._classify if self.folder.task == CLASSIFY else self._embed
        results: list[Any] = []
        for start in range(0, len(texts), batch_size):
            results += answer(texts[start : start + batch_size], names[start : start + batch_size])
        return results

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
        self._residents.fetch(names)
        with self._residents.lend(names, logits=LOGITS in outputs, headed=headed) as lent:
            answers = [self._run_part(feeds, part, outputs) for part in lent.parts]
        if len(answers) == 1:
            return answers[0], lent.labels
        order = np.argsort(np.concatenate([part.rows for part in lent.parts]))
        return {name: joined([a[name] for a in answers])[order] for name in outputs}, lent.labels

    def _run_part(
        self, feeds: Mapping[str, NDArray[Any]], part: Part, outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        base: dict[str, NDArray[Any]] = {}
        if self.folder.required and self.folder.guard is not None:
            base = {GUARD: np.zeros(self.folder.guard, dtype=np.uint8)} | self._residents.empty()
        own = {name: array[part.rows] for name, array in feeds.items()}
        return self._session.run(base | own | part.feeds, outputs)

    def _tokens(self) -> Texts:
        self._check_open()
        with self._texts_lock:
            if self._texts is None:
                self._texts = Texts(self.folder, self._session.inputs)
            return self._texts

    def _check_open(self) -> None:
        if self._closed:
            raise DeploymentError(f"{self.folder.root}: this deployment was closed.", hint="Open it again.")
