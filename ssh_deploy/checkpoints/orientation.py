"""Whether a weight is stored [in, out] (GPT-2's Conv1D) or [out, in] (everything else)."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from ssh_deploy.checkpoints.index import FLOATS, Checkpoint
from ssh_deploy.errors import AdapterMismatchError, CheckpointError

# transformers.pytorch_utils.Conv1D is used by these model types alone, under these names alone (transformers 5.23);
# their other layers are nn.Linear. Neither shape nor name alone tells: attn.c_proj is square.
_CONV1D_TYPES = {"gpt2", "imagegpt", "openai-gpt", "decision_transformer", "clvp", "clvp_decoder"}
_CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}


def is_transposed(checkpoint: Checkpoint, module: str) -> bool:
    """True when ``module``'s weight is stored as [in, out].

    Args:
        checkpoint: the base.
        module: path of a linear module.
    """
    kind = checkpoint.config.get("model_type")
    return kind in _CONV1D_TYPES and module.rsplit(".", 1)[-1] in _CONV1D_NAMES


def site_shape(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    """(out, in) of the weight of ``module`` (a path of the checkpoint).

    Raises:
        AdapterMismatchError: it is no matrix.
        CheckpointError: its stored numbers are not floats, so the base is quantised.
    """
    name = f"{module}.weight"
    shape, code = checkpoint.shape(name), checkpoint.dtype(name)
    if code not in FLOATS:
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is stored as {code}: the base is quantised or packed.",
            hint="Use the unquantised checkpoint it was made from, and quantise the result.",
        )
    if len(shape) != 2:
        raise AdapterMismatchError(
            f"{checkpoint.folder}: {name} is {list(shape)}, not a matrix.", hint="Only linear modules take a delta."
        )
    return (shape[1], shape[0]) if is_transposed(checkpoint, module) else (shape[0], shape[1])


def site_weight(checkpoint: Checkpoint, module: str) -> NDArray[Any]:
    """Read-only view [out, in] of the weight of ``module`` (a path of the checkpoint), in its stored dtype.

    Raises:
        AdapterMismatchError, CheckpointError: as `site_shape`.
    """
    site_shape(checkpoint, module)
    weight = checkpoint.read(f"{module}.weight")
    return weight.T if is_transposed(checkpoint, module) else weight
