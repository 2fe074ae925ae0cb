"""Export with a quantised base: the float32 graph is validated first, then stored in 8 or 4 bits and held against that.

Three questions again, each apart from the others: does the quantised graph compute what torch computes *with the
dequantised weights and the adapter* (kernels and slots are right); is it the quantised plain graph, bit for bit, when
no adapter is named; how far is the quantised base from the float32 one, and an adapter's effect on it from its effect
there (reported, never an error: an adapter is not to blame for its base).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ssh_deploy.errors import VerificationError
from ssh_deploy.graph.calibration import Moments, written_tokens
from ssh_deploy.graph.quantizing import Quantized, bits_of, quantize_weights
from ssh_deploy.graph.storing import save_graph
from ssh_deploy.graph.trace import Loaded, Traced
from ssh_deploy.jobs import validating
from ssh_deploy.jobs.export_job import Job
from ssh_deploy.jobs.validating import Checked, Outputs, first_numbers

#: Largest difference allowed between a quantised graph and torch with its dequantised weights: MatMulNBits rounds
#: activations to 8 bits at every layer. Root mean square of each output, as a share of its own standard deviation;
#: SmolLM2's 30 layers are at 0.03 on text, 0.07 on random tokens.
TOLERANCE = 0.2
_ROUNDED = {"nearest": "to the nearest", "gptq": "by what their layers read (GPTQ)"}


def compare(what: str, got: Sequence[Outputs], want: Sequence[Outputs], *, effect: float | None = None) -> Checked:
    """`validating.compare` for a quantised graph: many small differences are its nature, a large mean one is not.

    Raises:
        VerificationError: shapes differ, or numbers by more than `TOLERANCE`.
    """
    found = validating.compare(what, got, want, effect=effect, tolerance=np.inf)
    for mine, theirs in zip(got, want, strict=True):
        for name, right in theirs.items():
            apart = np.sqrt(np.square(mine[name].astype(np.float64) - right).mean()) if right.size else 0.0
            if not apart <= TOLERANCE * max(float(np.std(right)), 1e-6):
                raise VerificationError(
                    f"{what}: {name} of the quantised graph is {apart:.3g} (rms) off torch with the same weights, "
                    f"over {TOLERANCE} of its standard deviation {np.std(right):.3g}.",
                    hint="Nothing was written. Try --quantize int8, a smaller --block, or report this architecture.",
                )
    return found


def quantize_graph(job: Job, path: Path, traced: Traced, loaded: Loaded, *, keep: Collection[str]) -> Quantized:
    """Quantise the plain graph at ``path``, in its place.

    Args:
        job: with a ``quantize`` among its options.
        path: of a float32 graph.
        traced: of that graph.
        loaded: the model it was traced from; a decoder is asked what its layers read, for `ExportOptions.calibrate`.
        keep: modules left in float32 (heads).
    """
    model, options, embedding = ir.load(path), job.options, traced.embedding
    moments = None
    if options.quantize == "int4" and traced.cache is not None and options.calibrate:
        tokens = written_tokens(loaded.model, rows=options.calibrate)
        moments = Moments(
            loaded.model, tokens, wanted=lambda name: bits_of(name, scheme=options.quantize, embedding=embedding) == 4
        )
    made = quantize_weights(
        model, scheme=options.quantize, block=options.block, keep=keep, embedding=embedding, moments=moments
    )
    replace_graph(model, path)
    return made


def replace_graph(model: ir.Model, path: Path) -> None:
    """Write ``model`` over the graph at ``path``, from which it may still read what it kept."""
    folder = path.with_name(".quantized")
    folder.mkdir()
    save_graph(model, folder / path.name)
    for file in folder.iterdir():
        file.replace(path.with_name(file.name))
    folder.rmdir()


def drift(got: list[Outputs], want: list[Outputs]) -> dict[str, float]:
    """How far the first output is from the float32 base's: ``max`` and ``rms``, as shares of its spread."""
    mine, theirs = first_numbers(got), first_numbers(want)
    if not theirs.size:
        return {"max": 0.0, "rms": 0.0}
    apart, spread = mine - theirs, max(float(np.ptp(theirs)), 1e-30)
    return {"max": float(np.abs(apart).max()) / spread, "rms": float(np.sqrt(np.square(apart).mean())) / spread}


def kept_effect(
    quantized: tuple[list[Outputs], list[Outputs]], float32: tuple[list[Outputs], list[Outputs]]
) -> float | None:
    """Cosine between an adapter's change of the first output on the quantised base and on the float32 one.

    Args:
        quantized: answers with the adapter and without.
        float32: likewise.

    Returns:
        None where a change is zero or of another number of labels.
    """
    changes = []
    for with_it, without in (quantized, float32):
        on, off = first_numbers(with_it), first_numbers(without)
        if on.shape != off.shape:
            return None
        changes.append(on - off)
    size = float(np.linalg.norm(changes[0]) * np.linalg.norm(changes[1]))
    return float(changes[0] @ changes[1]) / size if size else None


def describe_quantized(
    job: Job, made: Quantized, quantized: Mapping[str, list[Outputs]], float32: Mapping[str, list[Outputs]]
) -> dict[str, Any]:
    """The field ``quantized`` of `deployment.json`, and a note for people.

    Args:
        job: told what people should know.
        made: what the pass did.
        quantized: answers of the quantised graph by adapter, ``""`` without one.
        float32: answers of the float32 graph, likewise.
    """
    drifted = drift(quantized[""], float32[""])
    effects = {
        name: kept_effect((quantized[name], quantized[""]), (float32[name], float32[""])) for name in quantized if name
    }
    eight = sum(bits == 8 for bits in made.modules.values())
    job.notes.append(
        f"{made.scheme}: {len(made.modules)} weights ({eight} of them in 8 bits), {made.before / 1e6:.1f} MB as "
        f"{made.after / 1e6:.1f} MB, rounded {_ROUNDED[made.rounding]}; "
        f"the base is {drifted['rms']:.1e} of its spread off float32 (rms)"
    )
    job.notes += [
        f"{name}: its effect on the quantised base has cosine {cosine:.3f} with that on the float32 one"
        for name, cosine in effects.items()
        if cosine is not None
    ]
    return {**made.as_dict(), "drift": drifted, "effects": effects}
