"""`bench transform --device cuda`: the fused kernels beside a device-to-device copy, PEFT's path and torch.fft.

What bounds ``W += ΔW`` is that W is read and written once; a copy of W moves the same bytes, so ``bandwidth_share`` is
the time of the copy over ours. Every variant works through as many weights as do not fit the L2 cache, one after the
other, and ends when the device has. ``fused`` is the kernels alone: the spectra lie on the device, and the launches are
recorded once in a CUDA graph; ``fused_launched`` launches them from Python each time; ``added`` starts from the
adapter's numbers in host memory, as a merge and a swap do.

Spectra are FourierFT's in all variants, so that PEFT's ``get_delta_weight`` makes the same ΔW: two separable
coefficients for each of the n; ``ssh`` is the kernels on n coefficients of the separable Hartley transform.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ssh_deploy.errors import DependencyError, VerificationError
from ssh_deploy.jobs.benching import Bench
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.jobs.timing import interleaved
from ssh_deploy.transforms import cpu, get_transform
from ssh_deploy.transforms.cuda.fused import Addend, Batch, Tile, add_batch, prepare, refusal, tile_of
from ssh_deploy.transforms.device import add_on_device

if TYPE_CHECKING:
    import torch

#: query and value of LLaMA-3.1-8B.
LAYERS_8B = ((4096, 4096, 32), (1024, 4096, 32))
#: Other tiles for bfloat16 at 4096², each tried once: `tile_of` says which one is used.
TILES = (Tile(64, 8, 32), Tile(64, 8, 64, warps=16), Tile(64, 16, 32, warps=16), Tile(32, 16, 32), Tile(32, 8, 64))
_SCALING = 150.0
_SEED = 777
_ENOUGH = 256 << 20  # bytes of weights that one pass works through: more than any L2 cache
_PASSES = 4


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """What is measured.

    ``sizes``: (M, N); ``dtypes`` of W; ``coefficients``: n; ``seconds``: most time for each size and dtype; ``layers``:
    (M, N, how many) of the whole model in bfloat16; ``tiles``: tried at the first size; ``copies``: weights of one
    size, None: enough of them; ``device``.
    """

    sizes: tuple[tuple[int, int], ...] = ((4096, 4096), (1024, 4096), (768, 768))
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    coefficients: int = 1000
    seconds: float = 15.0
    layers: tuple[tuple[int, int, int], ...] = LAYERS_8B
    tiles: tuple[Tile, ...] = TILES
    copies: int | None = None
    device: str = "cuda"


def measure_cuda(bench: Bench, *, options: CudaOptions | None = None, progress: Progress = silent) -> Bench:
    """Add the device's figures to ``bench`` and return it.

    ``summary``: ``bandwidth_share_M`` (bfloat16, square), ``speedup_vs_peft_M``, ``speedup_vs_torch_fft_M``,
    ``qv_8b_ms`` of the kernels on ``layers`` and ``qv_8b_from_host_ms`` with all that precedes them.

    Raises:
        DependencyError: torch sees no such device, or triton is not installed.
        VerificationError: a ΔW is wrong: nothing is timed then.
    """
    import torch

    options = options or CudaOptions()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise DependencyError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device.", hint="Use --device cpu, or a CUDA build."
        )
    if options.device == "cuda":
        bench.machine = {**bench.machine, "gpu": torch.cuda.get_device_name()}
    for shape in options.sizes:
        for dtype in options.dtypes:
            _measure_size(bench, shape, getattr(torch, dtype), options, progress)
    _measure_layers(bench, options)
    return bench


def _measure_size(
    bench: Bench, shape: tuple[int, int], dtype: torch.dtype, options: CudaOptions, progress: Progress
) -> None:
    import torch

    size = shape[0] * shape[1] * dtype.itemsize
    copies = options.copies or max(2, -(-_ENOUGH // size))
    weights = [torch.randn(shape, device=options.device).to(dtype) for _ in range(copies)]
    spare = [torch.empty_like(weight) for weight in weights]
    layer, fourier = _peft(shape, options.coefficients, options.device)
    ours = _hartley(shape, options.coefficients)
    reason = refusal(weights[0], fourier)
    if reason is not None:
        raise DependencyError(f"The kernels do not take {shape[0]}×{shape[1]}: {reason}.", hint="See bench.results.")
    error = max(_check(shape, dtype, addend, options.device) for addend in (fourier, ours))
    batches = [prepare(shape, [fourier], device=options.device, dtype=dtype) for _ in weights]
    separable = [prepare(shape, [ours], device=options.device, dtype=dtype) for _ in weights]
    places, values = (torch.from_numpy(np.array(part)).to(options.device) for part in (layer.places, layer.values))

    @torch.no_grad()
    def through_peft(weight: torch.Tensor) -> None:
        weight += layer.module.get_delta_weight("default").to(weight.dtype)

    def through_fft(weight: torch.Tensor) -> None:
        whole = torch.zeros(shape, device=weight.device)
        whole[places[0], places[1]] = values
        weight += (torch.fft.ifft2(whole).real * _SCALING).to(weight.dtype)

    def every(work: Callable[[torch.Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            for weight in weights:
                work(weight)

        return run

    def copying() -> None:
        for source, target in zip(weights, spare, strict=True):
            target.copy_(source)

    recorded = {"fused": _recorded(batches, weights), "ssh": _recorded(separable, weights)}
    if shape == options.sizes[0] and dtype == torch.bfloat16:
        for tile in options.tiles:
            if shape[0] % tile.p == 0 and tile != tile_of(shape[0], dtype):
                tiled = [prepare(shape, [fourier], device=options.device, dtype=dtype, tile=tile) for _ in weights]
                recorded[f"fused {tile.p}·{tile.b}·{tile.bn} {tile.warps} warps"] = _recorded(tiled, weights)

    def launching() -> None:
        for batch, weight in zip(batches, weights, strict=True):
            add_batch(batch, [weight])

    variants: dict[str, Callable[[], object]] = {
        "copy": copying,
        **recorded,
        "fused_launched": launching,
        "added": lambda: add_on_device(weights, [fourier] * copies),
        "peft": every(through_peft),
        "torch_fft": every(through_fft),
    }
    timed = interleaved(
        {name: _finished(work) for name, work in variants.items()},
        base="fused",
        seconds=options.seconds,
        width=0.02,
        progress=progress,
        stage=f"{shape[0]}×{shape[1]} {dtype}",
    )
    name = f"{shape[0]}x{shape[1]}"
    for variant, one in timed.items():
        row: dict[str, Any] = {
            "device": options.device,
            "shape": name,
            "dtype": str(dtype).removeprefix("torch."),
            "variant": variant,
        }
        row |= {key: value for key, value in one.as_dict().items() if key != "name"}
        row["ms"] = round(one.ms / (_PASSES * copies), 5)
        row["over_memcpy"] = round(one.ratio / timed["copy"].ratio, 4)
        row["bandwidth_share"] = round(timed["copy"].ms / one.ms, 4)
        bench.results.append(row | ({"error": error} if variant == "fused" else {}))
    if dtype == torch.bfloat16 and shape[0] == shape[1]:
        bench.summary[f"bandwidth_share_{shape[0]}"] = round(timed["copy"].ratio, 4)
        bench.summary[f"speedup_vs_peft_{shape[0]}"] = round(timed["peft"].ratio, 2)
        bench.summary[f"speedup_vs_torch_fft_{shape[0]}"] = round(timed["torch_fft"].ratio, 2)


def _finished(work: Callable[[], object]) -> Callable[[int], object]:
    """``work``, `_PASSES` times, until the device is done."""
    import torch

    def run(_: int) -> None:
        for _pass in range(_PASSES):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def _recorded(batches: Sequence[Batch], weights: Sequence[torch.Tensor]) -> Callable[[], object]:
    """The launches for all ``weights`` as one CUDA graph; without a GPU, the launches."""
    import torch

    addresses = [torch.tensor([w.data_ptr()], dtype=torch.int64).to(w.device) for w in weights]

    def launch() -> None:
        for batch, weight, address in zip(batches, weights, addresses, strict=True):
            add_batch(batch, [weight], addresses=address)

    if weights[0].device.type != "cuda":
        return launch
    launch()  # compiles, and fills what is kept
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


def _measure_layers(bench: Bench, options: CudaOptions) -> None:
    """All of `CudaOptions.layers` in bfloat16: the kernels on spectra that are there, and from host memory."""
    import torch

    weights, addends = [], []
    for m, n, count in options.layers:
        weights += [torch.randn((m, n), device=options.device).bfloat16() for _ in range(count)]
        addends += [_hartley((m, n), options.coefficients, seed=i) for i in range(count)]
    if not weights:
        return
    pairs = zip(weights, addends, strict=True)
    batches = [prepare((w.shape[0], w.shape[1]), [a], device=options.device, dtype=w.dtype) for w, a in pairs]
    variants = {"kernels": _recorded(batches, weights), "from_host": lambda: add_on_device(weights, addends)}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(9):
        for name, work in variants.items():
            begun = time.perf_counter()
            _finished(work)(0)
            times[name].append((time.perf_counter() - begun) / _PASSES)
    found = {name: round(1e3 * float(np.median(spent)), 4) for name, spent in times.items()}
    bench.summary |= {"qv_8b_ms": found["kernels"], "qv_8b_from_host_ms": found["from_host"]}


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    module: Any
    places: np.ndarray[Any, np.dtype[np.int64]]
    values: np.ndarray[Any, np.dtype[np.float32]]


def _peft(shape: tuple[int, int], n: int, device: str) -> tuple[_Layer, Addend]:
    """PEFT's own FourierFT layer on ``device``, and the same ΔW as an addend."""
    import torch

    try:
        from peft import FourierFTConfig, get_peft_model
    except ImportError as error:
        raise DependencyError(f"bench transform needs peft ({error}).", hint="pip install peft") from error
    torch.manual_seed(_SEED)
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
    config = FourierFTConfig(n_frequency=n, scaling=_SCALING, random_loc_seed=_SEED, target_modules=["0"])
    adapted: Any = get_peft_model(model, config).base_model.model
    module = adapted[0].to(device)
    places = module.indices["default"].cpu().numpy()
    values = module.fourierft_spectrum["default"].detach().float().cpu().numpy()
    transform = get_transform("fourier")
    gain = _SCALING / float(np.sqrt(shape[0] * shape[1]))
    spectrum = transform.separable(places[0], places[1], values, shape)
    return _Layer(module, places, values), Addend(transform.axis, spectrum, gain)


def _hartley(shape: tuple[int, int], n: int, *, seed: int = 0) -> Addend:
    rng, transform = np.random.default_rng(seed), get_transform("hartley")
    rows, cols = np.divmod(rng.choice(shape[0] * shape[1], n, replace=False), shape[1])
    spectrum = transform.separable(rows, cols, rng.standard_normal(n).astype(np.float32), shape)
    return Addend(transform.axis, spectrum, _SCALING / float(np.sqrt(shape[0] * shape[1])))


def _check(shape: tuple[int, int], dtype: torch.dtype, addend: Addend, device: str) -> float:
    """Relative error of ΔW as the kernels write it, against float64.

    Raises:
        VerificationError: more than four roundings of ``dtype``.
    """
    import torch

    out = torch.zeros(shape, dtype=dtype, device=device)
    add_batch(prepare(shape, [addend], device=device, dtype=dtype), [out])
    exact = cpu.synthesis(shape, addend.axis, addend.spectrum, gain=addend.gain, dtype=np.float64)
    error = float(np.linalg.norm(out.cpu().double().numpy() - exact) / np.linalg.norm(exact))
    if not error < 4 * torch.finfo(dtype).eps:
        raise VerificationError(
            f"ΔW of {shape[0]}×{shape[1]} in {dtype} is off by {error:.2g} of itself.", hint="Report this."
        )
    return error
