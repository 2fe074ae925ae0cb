"""A picture of an adapter: where its coefficients lie, and |ΔW| of its strongest module."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.checkpoints.whole import whole_file
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import AdapterMismatchError, DependencyError
from ssh_deploy.transforms.cpu import synthesis

MAX_DENSE = 1 << 24  # entries of ΔW that are formed for a picture: 64 MB in float32
MAX_POINTS = 60_000  # coefficients drawn, the strongest
MAX_PIXELS = 512  # of |ΔW| a side; blocks show their maximum
_INK, _SOFT, _PAPER, _GRID = "#1b1e28", "#5b6072", "#ffffff", "#d9dce3"
_LEFT, _RIGHT, _BOTTOM, _WIDTH, _HEIGHT = 0.06, 0.545, 0.085, 0.378, 0.702  # 378/702 = 7/13: square panels
_MAP = "magma_r"


def draw_adapter(adapter: Adapter, path: Path) -> None:
    """Draw the coefficients of all modules as large as the strongest one, and that one's |ΔW|, to the PNG ``path``.

    Raises:
        AdapterMismatchError: no module has a spectrum.
        DependencyError: matplotlib is not installed.
        OutputError: ``path`` cannot be written.
    """
    spectral = {name: d for name, d in adapter.deltas.items() if isinstance(d, SpectralDelta)}
    if not spectral:
        raise AdapterMismatchError(
            f"{adapter.source}: no module of it has a spectrum to draw.", hint="Only spectral families have a picture."
        )
    name = max(spectral, key=lambda n: (float(np.linalg.norm(spectral[n].values.astype(np.float64))), n))
    strongest = spectral[name]
    alike = [d for d in spectral.values() if d.shape == strongest.shape]
    figure_class, agg_class = _matplotlib()
    figure = figure_class(figsize=(13, 7), dpi=150, facecolor=_PAPER)
    agg_class(figure)
    _draw_places(figure, alike, strongest)
    _draw_change(figure, name, strongest)
    total = f"{adapter.parameters:,} coefficients in {len(adapter.deltas)} weights"
    figure.text(0.06, 0.955, adapter.source.name, color=_INK, fontsize=16, weight="bold")
    figure.text(
        0.94, 0.955, f"{adapter.family} · {strongest.transform} · {total}", color=_SOFT, fontsize=12, ha="right"
    )
    _save(figure, path)


def _draw_places(figure: Any, alike: list[SpectralDelta], strongest: SpectralDelta) -> None:
    """Scatter of places, coloured by size, with the energy of rows and columns beside it."""
    m, n = strongest.shape
    rows = np.concatenate([d.rows for d in alike]).astype(np.int64)
    cols = np.concatenate([d.cols for d in alike]).astype(np.int64)
    values = np.abs(np.concatenate([d.values.astype(np.float64) * d.alpha for d in alike]))
    values = values / (values.max(initial=0.0) or 1.0)
    main = figure.add_axes((_LEFT, _BOTTOM, _WIDTH, _HEIGHT))
    top = figure.add_axes((_LEFT, _BOTTOM + _HEIGHT + 0.008, _WIDTH, 0.06), sharex=main)
    side = figure.add_axes((_LEFT + _WIDTH + 0.005, _BOTTOM, 0.034, _HEIGHT), sharey=main)
    order = np.argsort(values)[-MAX_POINTS:]  # strongest drawn last, on top
    size = np.clip(30_000 / max(1, order.size), 3, 26)
    main.scatter(cols[order], rows[order], c=values[order], s=size, cmap=_MAP, vmin=-0.15, vmax=1, linewidths=0)
    main.set(
        xlim=(-0.01 * n, 1.01 * n), ylim=(1.01 * m, -0.01 * m), xlabel="input frequency v", ylabel="output frequency u"
    )
    for axis, places, length, across in ((top, cols, n, False), (side, rows, m, True)):
        energy, edges = np.histogram(places, bins=min(length, 48), range=(0, length), weights=values**2)
        share = energy / (energy.sum() or 1.0)
        draw = axis.barh if across else axis.bar
        draw(edges[:-1], share, np.diff(edges) * 0.86, align="edge", color="#b5367a")
        axis.tick_params(labelbottom=False, labelleft=False, bottom=False, left=False)
        axis.set_frame_on(False)
    count = f"{len(alike)} weights of {m}×{n}" if len(alike) > 1 else f"one weight of {m}×{n}"
    _title(figure, _LEFT, "Where the coefficients lie", f"{count}; darker is larger; bars: share of the energy")
    _frame(main)


def _draw_change(figure: Any, name: str, delta: SpectralDelta) -> None:
    axis = figure.add_axes((_RIGHT, _BOTTOM, _WIDTH, _HEIGHT))
    m, n = delta.shape
    if m * n > MAX_DENSE:
        axis.text(0.5, 0.5, f"{m}×{n} is too large to draw", ha="center", va="center", color=_INK)
        axis.set_axis_off()
        _title(figure, _RIGHT, "|ΔW| of the strongest weight", name)
        return
    change = np.abs(synthesis(delta.shape, delta.axis, delta.separable(), gain=delta.gain))
    image = axis.imshow(
        _pooled(change),
        cmap=_MAP,
        vmin=0,
        vmax=float(np.quantile(change, 0.999)) or 1.0,
        extent=(0, n, m, 0),
        aspect="auto",
        interpolation="nearest",
    )
    bar = figure.colorbar(image, cax=figure.add_axes((_RIGHT + _WIDTH + 0.008, _BOTTOM, 0.01, _HEIGHT)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=9, colors=_INK)
    axis.set(xlabel="input", ylabel="output")
    _title(figure, _RIGHT, "|ΔW| of the strongest weight", f"{name};  ‖ΔW‖ = {np.linalg.norm(change):.3g}")
    _frame(axis)


def _title(figure: Any, left: float, title: str, subtitle: str) -> None:
    figure.text(left, 0.895, title, color=_INK, fontsize=12, weight="bold")
    figure.text(left, 0.868, subtitle, color=_SOFT, fontsize=9.5)


def _frame(axis: Any) -> None:
    for spine in axis.spines.values():
        spine.set_color(_GRID)
    axis.tick_params(colors=_SOFT, labelsize=9, color=_GRID)
    axis.xaxis.label.set(color=_INK, fontsize=10)
    axis.yaxis.label.set(color=_INK, fontsize=10)


def _pooled(change: NDArray[Any]) -> NDArray[Any]:
    """Maxima over blocks, so that at most `MAX_PIXELS` a side are left."""
    for dim in (0, 1):
        step = -(-change.shape[dim] // MAX_PIXELS)
        if step > 1:
            change = np.maximum.reduceat(change, np.arange(0, change.shape[dim], step), axis=dim)
    return change


def _matplotlib() -> tuple[Any, Any]:
    """Figure and the Agg canvas, without pyplot: no window, no global state."""
    try:
        figure = importlib.import_module("matplotlib.figure").Figure
        return figure, importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
    except ImportError as error:
        raise DependencyError("--plot needs matplotlib.", hint="pip install 'ssh-deploy[plot]'") from error


def _save(figure: Any, path: Path) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", facecolor=_PAPER)
