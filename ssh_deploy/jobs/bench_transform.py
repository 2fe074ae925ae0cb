"""`bench transform`: ``W += ΔW`` out of a sparse spectrum, beside PEFT, torch.fft, scipy and a plain copy of W.

All in one interleaved run, a group for each size: what others have is ΔW alone, ours is added into W. ``ours`` is an
SSH adapter of n coefficients; ``ours_fourier`` is the very ΔW that PEFT's FourierFT layer makes, from the same places
and numbers (two separable coefficients each). Both are checked before anything is timed. On a GPU it is
`bench_transform_cuda`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import DependencyError, VerificationError
from ssh_deploy.jobs.benching import Bench, describe_machine
from ssh_deploy.jobs.merge_plan import chosen_device
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.jobs.timing import Timed, Variant, interleaved, spun_down
from ssh_deploy.transforms.cpu import add_synthesis

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = ("device", "shape", "dtype", "variant", "ms", "ratio", "low", "high", "over_memcpy", "rounds")
_SCALING = 150.0
_CLOSE = 1e-5  # of the largest number of ΔW; float32 on both sides
_SEED = 777
_SPIN = 0.01  # seconds
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True, slots=True)
class TransformOptions:
    """What `bench transform` measures.

    Attributes:
        sizes: (M, N); the summary knows 4096² and 768².
        dtypes: of W; PEFT and the others are measured beside float32.
        coefficients: n.
        threads: None: all cores.
        seconds: most time for each size and dtype.
        device: ``cpu`` or ``cuda``.
    """

    sizes: tuple[tuple[int, int], ...] = ((4096, 4096), (768, 768))
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    coefficients: int = 1000
    threads: int | None = None
    seconds: float = 20.0
    device: str = "cpu"


def measure_transform(*, options: TransformOptions | None = None, progress: Progress = silent) -> Bench:
    """Measure what ``options`` say.

    Raises:
        DependencyError: torch or peft is not installed, or CUDA asked for where there is none.
        VerificationError: a ΔW is wrong: nothing is timed then.
    """
    options = options or TransformOptions()
    device = chosen_device(options.device)
    torch = _torch()
    bench = Bench("transform", describe_machine(threads=options.threads))
    if device != "cpu":
        from ssh_deploy.jobs.bench_transform_cuda import CudaOptions, measure_cuda

        cuda = CudaOptions(options.sizes, options.dtypes, options.coefficients, options.seconds)
        return measure_cuda(bench, options=cuda, progress=progress)
    threads, before = int(bench.machine["threads"]), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in options.sizes:
            peft, fourier = _peft(shape, options.coefficients)
            ours = _ssh(shape, options.coefficients)
            _check(ours, fourier, peft)
            for dtype in options.dtypes:
                variants = _cpu_variants(ours, fourier, dtype, peft, threads)
                stage = f"{shape[0]}x{shape[1]} {dtype}"
                settle = {name: _settled(variant) for name, variant in variants.items()}
                timed = interleaved(
                    variants,
                    base="ours",
                    seconds=options.seconds,
                    width=0.02,
                    before=settle,
                    progress=progress,
                    stage=stage,
                )
                _add(bench, device, shape, dtype, timed)
    finally:
        torch.set_num_threads(before)
    return bench


def _settled(variant: Variant) -> Variant:
    """Right before it is timed a variant runs for a while, after torch's threads, which spin, have gone to sleep.

    So each finds the machine as it left it itself, and at the clock that it reaches after some milliseconds of work:
    one run was too little of that for the short ones.
    """

    def settle(i: int) -> None:
        time.sleep(_SPIN)
        spun_down(variant, i, seconds=_SPIN)

    return settle


def _add(bench: Bench, device: str, shape: tuple[int, int], dtype: str, timed: Mapping[str, Timed]) -> None:
    name = f"{shape[0]}x{shape[1]}"
    for variant, one in timed.items():
        row: dict[str, Any] = {"device": device, "shape": name, "dtype": dtype, "variant": variant}
        row["over_memcpy"] = round(one.ratio / timed["memcpy"].ratio, 4)
        bench.results.append(row | {k: v for k, v in one.as_dict().items() if k != "name"})
    if dtype == "float32" and shape[0] == shape[1]:
        bench.summary[f"speedup_vs_peft_{shape[0]}"] = round(timed["peft"].ratio, 3)
        bench.summary[f"over_memcpy_{shape[0]}"] = round(1 / timed["memcpy"].ratio, 3)


def _ssh(shape: tuple[int, int], n: int) -> SpectralDelta:
    rng = np.random.default_rng(_SEED)
    rows, cols = np.divmod(rng.choice(shape[0] * shape[1], n, replace=False), shape[1])
    kind = np.uint16 if max(shape) <= 1 << 16 else np.uint32
    values = rng.standard_normal(n).astype(np.float32)
    return SpectralDelta(shape, "hartley", rows.astype(kind), cols.astype(kind), values, _SCALING, "backward")


def _peft(shape: tuple[int, int], n: int) -> tuple[Callable[[str], Tensor], SpectralDelta]:
    """PEFT's own layer: its ``get_delta_weight`` by device, and the same spectrum as ours."""
    torch = _torch()
    try:
        from peft import FourierFTConfig, get_peft_model
    except ImportError as error:
        raise DependencyError(f"bench transform needs peft ({error}).", hint="pip install peft") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
        config = FourierFTConfig(n_frequency=n, scaling=_SCALING, random_loc_seed=_SEED, target_modules=["0"])
        layer: Any = get_peft_model(model, config).get_submodule("base_model.model.0")
    rows, cols = layer.indices["default"].numpy()
    values = layer.fourierft_spectrum["default"].detach().float().numpy()
    delta = SpectralDelta(shape, "fourier", rows, cols, values, _SCALING, "backward")

    layer.requires_grad_(False)

    def weight(device: str) -> Tensor:
        made: Tensor = layer.to(device).get_delta_weight("default")
        return made

    return weight, delta


def _check(ours: SpectralDelta, fourier: SpectralDelta, peft: Callable[[str], Tensor]) -> None:
    """Both deltas against float64 transforms of the whole spectrum; PEFT's against ours.

    Raises:
        VerificationError: which one is wrong.
    """
    whole = _spectrum(ours)
    axis = ours.axis
    want = ours.gain * axis.inverse_cpu(axis.inverse_cpu(whole.astype(np.float64), 0), 1)
    also = np.fft.ifft2(_spectrum(fourier).astype(np.float64)).real * _SCALING
    for name, got, exact in (
        ("ours", _dense(ours), want),
        ("ours_fourier", _dense(fourier), also),
        ("peft", peft("cpu").numpy(), also),
    ):
        if np.abs(got - exact).max() > _CLOSE * np.abs(exact).max():
            raise VerificationError(f"{name}: ΔW of {ours.shape} is not what it has to be.", hint="Report this.")


def _dense(delta: SpectralDelta) -> NDArray[np.float32]:
    out = np.zeros(delta.shape, np.float32)
    add_synthesis(out, delta.axis, delta.separable(), gain=delta.gain)
    return out


def _spectrum(delta: SpectralDelta) -> NDArray[np.float32]:
    whole = np.zeros(delta.shape, np.float32)
    whole[delta.rows, delta.cols] = delta.values
    return whole


def _cpu_variants(
    ours: SpectralDelta, fourier: SpectralDelta, dtype: str, peft: Callable[[str], Tensor], threads: int
) -> dict[str, Variant]:
    torch = _torch()
    numbers = np.random.default_rng(0).standard_normal(ours.shape, dtype=np.float32).astype(_DTYPES[dtype])
    # as weights of a model lie: torch begins them where a line of the cache begins, numpy does not
    weight, copy = (torch.from_numpy(numbers.view(np.uint8)).clone().numpy().view(numbers.dtype) for _ in range(2))

    def adding(delta: SpectralDelta) -> Variant:
        return lambda _: add_synthesis(weight, delta.axis, delta.separable(), gain=delta.gain, threads=threads)

    variants: dict[str, Variant] = {"ours": adding(ours), "memcpy": lambda _: np.copyto(copy, weight)}
    if dtype != "float32":
        return variants
    places = tuple(torch.from_numpy(np.asarray(part, np.int64)) for part in (fourier.rows, fourier.cols))
    values = torch.from_numpy(np.array(fourier.values))

    def through_torch(_: int) -> object:
        spectrum = torch.zeros(fourier.shape)
        spectrum[places] = values
        return torch.fft.ifft2(spectrum).real * _SCALING

    variants |= {"ours_fourier": adding(fourier), "peft": lambda _: peft("cpu"), "torch_fft": through_torch}
    try:
        from scipy import fft
    except ImportError:  # a peer that is there or not
        return variants

    def through_scipy(_: int) -> object:
        return fft.ifft2(_spectrum(fourier), workers=threads).real * np.float32(_SCALING)

    return variants | {"scipy": through_scipy}


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise DependencyError(f"bench transform needs torch ({error}).", hint="pip install torch") from error
    return torch
