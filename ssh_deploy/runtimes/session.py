"""One ONNX Runtime session: its inputs by name, its answers as arrays, its exceptions mapped to ours at one border.

Adapters are lent to a run as plain feeds, zero-copy: the arrays belong to the caller and live through the call.
ORT's own `LoraAdapter` is not used here. A run with it costs the same (5.8 µs against 7.0 µs of feeding four
arrays, on an empty graph; 5.2 against 5.0–5.4 ms of CPU on all-MiniLM-L6-v2 at one row of 16 tokens, one thread),
it cannot take its row from a bank that is resident anyway, and `RunOptions` does not keep it alive: after garbage
collection a run answered with another adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import DependencyError, DeploymentError

_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the graph: numpy dtype (None for one numpy has not) and sides, symbolic ones by their name."""

    name: str
    dtype: Any
    shape: tuple[int | str | None, ...]


class Session:
    """An ONNX model, loaded.

    Attributes:
        inputs: the model's own inputs.
        adapter_inputs: those of the contract, whose names begin with ``adapter_``; optional or required.
        outputs: names in the model's order.
        output_shapes: their sides by name, symbolic ones by theirs.
        device: where the first provider computes, ``cpu`` or ``cuda``.
    """

    def __init__(
        self,
        model: Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        cpu_fallback: bool = True,
    ) -> None:
        """Load ``model``; ``threads`` of one operator (None: ORT decides), ``providers`` as ORT names them.

        ``cpu_fallback=False``: refuse the model where the first provider leaves any operator to the CPU.

        Raises:
            DependencyError: onnxruntime is not installed.
            DeploymentError: not a model that ORT can load.
        """
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3  # an overridable initializer makes ORT warn at every load
        if threads is not None:
            options.intra_op_num_threads = threads
        if not cpu_fallback:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        chosen = list(providers) if providers is not None else default_providers()
        with _border(f"{model}: ONNX Runtime {ort.__version__} cannot load it", "Export or fetch the folder again."):
            self._session: Any = ort.InferenceSession(str(model), options, providers=chosen)
        self.device = "cuda" if self._session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        own = [_input(node) for node in self._session.get_inputs()]
        lent = [_input(node) for node in self._session.get_overridable_initializers()]
        self.inputs = {i.name: i for i in own if not i.name.startswith("adapter_")}
        self.adapter_inputs = {i.name: i for i in (*own, *lent) if i.name.startswith("adapter_")}
        self.output_shapes = {node.name: tuple(node.shape) for node in self._session.get_outputs()}
        self.outputs = tuple(self.output_shapes)

    @property
    def upload(self) -> Callable[[NDArray[Any]], Any] | None:
        """Copies an array to where runs compute, as an OrtValue that `run` takes; None where that is here."""
        if self.device == "cpu":
            return None
        return lambda array: onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Answer ``feeds``, arrays or OrtValues; safe from several threads. ``outputs``: names, or None for all.

        Raises:
            DeploymentError: whatever ORT refuses.
        """
        session, names = self._session, list(self.outputs if outputs is None else outputs)
        if not all(isinstance(fed, np.ndarray) for fed in feeds.values()):
            return self.run_kept(feeds, names, kept=())[0]
        if session is None:
            raise DeploymentError("The session was closed.", hint="Open the deployment again.")
        with _border("ONNX Runtime refused the run", "Check names, dtypes and shapes of the feeds."):
            answers = session.run(names, dict(feeds))
        return dict(zip(names, answers, strict=True))

    def run_kept(
        self, feeds: Mapping[str, Any], outputs: Sequence[str], *, kept: Sequence[str]
    ) -> tuple[dict[str, NDArray[Any]], list[Any]]:
        """Answer ``feeds``, and leave some outputs where the next run takes them from; safe from several threads.

        On the CPU nothing is copied here either way; on a GPU what is kept stays there.

        Args:
            feeds: arrays, or what an earlier run kept, by input name.
            outputs: names to bring back as arrays.
            kept: names to leave, in order.

        Returns:
            ``outputs`` by name, and an OrtValue for each of ``kept``.

        Raises:
            DeploymentError: whatever ORT refuses.
        """
        session = self._session
        if session is None:
            raise DeploymentError("The session was closed.", hint="Open the deployment again.")
        with _border("ONNX Runtime refused the run", "Check names, dtypes and shapes of the feeds."):
            binding = session.io_binding()
            for name, value in feeds.items():
                binding.bind_ortvalue_input(name, ort_value(value))
            for name in outputs:
                binding.bind_output(name, "cpu")
            for name in kept:
                binding.bind_output(name, self.device)
            session.run_with_iobinding(binding)
            values = binding.get_outputs()
            return {name: v.numpy() for name, v in zip(outputs, values, strict=False)}, values[len(outputs) :]

    def close(self) -> None:
        """Let go of the model; a run that goes on keeps it until its end."""
        self._session = None


def onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        DependencyError: not installed; names both extras.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise DependencyError(
            f"onnxruntime is not installed ({error}).",
            hint="`pip install 'ssh-deploy[cpu]'`, or `'ssh-deploy[gpu]'` for CUDA; never both, they overwrite "
            "each other's files.",
        ) from error
    if not hasattr(ort, "InferenceSession"):  # what is left when one of the two packages was uninstalled
        raise DependencyError(
            "onnxruntime is there but empty: one of its two packages was uninstalled over the other.",
            hint="`pip uninstall onnxruntime onnxruntime-gpu`, then install 'ssh-deploy[cpu]' or 'ssh-deploy[gpu]'.",
        )
    return ort


def ort_value(array: Any) -> Any:
    """``array`` as ONNX Runtime's own value, which reads it where it is and keeps it alive; one already, itself."""
    if not isinstance(array, np.ndarray):
        return array
    return onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def default_providers() -> list[str]:
    """CUDA where this onnxruntime has it, then the CPU."""
    there = onnxruntime().get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]


def read_parameters(path: Path) -> dict[str, NDArray[Any]]:
    """Tensors of an ``.onnx_adapter`` file by input name, copied out of it.

    Raises:
        DeploymentError: no such file, or not one that ORT can read.
    """
    ort = onnxruntime()
    with _border(f"{path}: not an .onnx_adapter that ONNX Runtime can read", "Export or fetch the adapter again."):
        parameters = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        return {name: np.array(value.numpy()) for name, value in parameters.items()}


def _input(node: Any) -> Input:
    return Input(node.name, _DTYPES.get(node.type), tuple(node.shape))


@contextmanager
def _border(what: str, hint: str) -> Iterator[None]:
    """Turn whatever ORT raises (its classes share no root) into one `DeploymentError` with its first line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:400]
        raise DeploymentError(f"{what}: {reason}", hint=hint) from error
