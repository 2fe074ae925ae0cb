"""IntLoRA: a low-rank change trained on a quantised weight, in its multiplying and its shifting form.

The base was quantised beside an auxiliary matrix R, ``W ≈ R + s·W_int``, and so the change is a factor on integers:

    V = s + (R + BA) / W_int        (where W_int = 0, by 1; the product below is 0 there whatever V is)
    mul:    U = clip(round(V / s₂) + z₂) − z₂,   W′ = s₂ · (U · W_int)        an integer multiplication
    shift:  W′ = sign(V) · 2^round(log₂|V|) · W_int                          a shift by bits

These are the released layers' formulas and names of tensors (csguoh/IntLoRA). W_int is the file's own, W is not asked:
a merge into floats writes W′, and `--dtype int8` its integers. No slot holds it: W′ − W is of full rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles, check_finite
from ssh_deploy.adapters.peft_folder import CONFIG, adapter_of, by_module, number
from ssh_deploy.deltas.integral import IntegralDelta
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError
from ssh_deploy_lowrank.folders import all_of, floats, refuse

_A, _B, _R = "loraA.weight", "loraB.weight", "aux_R"
_BASE, _SCALE, _ZERO = "ori_weight_round", "weight_quant_delta", "weight_quant_zero_point"
_SCALE2, _ZERO2 = "double_quant_delta", "double_quant_zero_point"
_SHIFT = (_A, _B, _R, _BASE, _SCALE, _ZERO)
_PARTS = {"mul": (*_SHIFT, _SCALE2, _ZERO2), "shift": _SHIFT}
_TINY = 1e-16  # the released layer's: what log₂ of zero is taken at
#: Powers of two this far below a row's largest are less than half a step of int8, and are left out of int64.
_SPAN = 40
#: ‖W − R − s·W_int‖ / ‖W − R‖: 4 bits leave a tenth, another base more than all.
_FAR = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class IntLoRADelta(IntegralDelta):
    """``parts``: tensors by the released names, float32, columns as [out]; ``top``: largest code, 2^bits − 1."""

    parts: Mapping[str, NDArray[Any]]
    top: int

    kind: ClassVar[str] = "intlora"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        out, inn = self.parts[_BASE].shape
        return out, inn

    @property
    def rank(self) -> int:
        """Of B A."""
        return int(self.parts[_A].shape[0])

    @property
    def parameters(self) -> int:
        """Trained numbers: B, A and, of the multiplying form, its second scales and zeros."""
        return sum(int(self.parts[name].size) for name in (_A, _B, _SCALE2, _ZERO2) if name in self.parts)

    @property
    def _integers(self) -> NDArray[np.int64]:
        """W_int."""
        codes, zeros = (self.parts[name].astype(np.int64) for name in (_BASE, _ZERO))
        return codes - zeros[:, None]

    def product(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """See `IntegralDelta.product`."""
        part = {name: tensor.astype(np.float64) for name, tensor in self.parts.items()}
        base = self._integers
        change = (part[_R] + part[_B] @ part[_A]) / np.where(base == 0, 1, base)
        factor = part[_SCALE][:, None] + change
        if _SCALE2 in part:
            zero = np.rint(part[_ZERO2])[:, None]  # trained with fractions, which no integer can be
            codes = np.clip(np.rint(factor / part[_SCALE2][:, None]) + zero, 0, self.top) - zero
            return codes.astype(np.int64) * base, part[_SCALE2]
        power = np.rint(np.log2(np.abs(factor) + _TINY)).astype(np.int64)
        highest = np.where(base == 0, np.iinfo(np.int64).min, power).max(axis=1, keepdims=True)
        highest = np.where((base == 0).all(axis=1, keepdims=True), 0, highest)
        shift = power - highest + _SPAN
        numbers = np.sign(factor).astype(np.int64) * base
        numbers = np.where((shift < 0) | (base == 0), 0, numbers << np.clip(shift, 0, _SPAN))
        return numbers, np.ldexp(1.0, (highest - _SPAN)[:, 0])

    def check_base(self, weight: NDArray[np.float64]) -> None:
        """See `IntegralDelta.check_base`."""
        apart = weight - self.parts[_R]
        far = np.linalg.norm(apart - self.parts[_SCALE][:, None].astype(np.float64) * self._integers)
        whole = np.linalg.norm(apart)
        if far > _FAR * whole:
            raise AdapterMismatchError(
                f"The integers of an IntLoRA are {far / whole:.0%} away from the weight they should stand for.",
                hint="It was made on another base; merge it into its own.",
            )


@dataclass(frozen=True, slots=True)
class IntLoRA:
    """Tensors ``<module>.`` + the released layers' buffers; config ``variant`` mul or shift, ``n_bits``, ``r``."""

    name: str = "intlora"
    peft_type: str = "INTLORA"
    slots: tuple[str, ...] = ()

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        where = f"{files.folder}/{CONFIG}"
        refuse(files, {"symmetric": "its codes have no zero points, which is not covered."})
        variant, bits = files.config.get("variant"), files.config.get("n_bits", 8)
        if variant not in _PARTS:
            raise AdapterFileError(
                f"{where}: variant is {variant!r:.40}.", hint="IntLoRA multiplies (mul) or shifts (shift); write which."
            )
        if type(bits) is not int or not 2 <= bits <= 8:
            raise AdapterFileError(f"{where}: n_bits is {bits!r:.40}.", hint="Its codes have 2 to 8 bits.")
        modules, rest = by_module(files, _PARTS["mul"])
        rank, top = number(files, "r"), 2**bits - 1
        deltas = {}
        for module, parts in modules.items():
            deltas[module] = _delta(f"{files.folder}: {module}", parts, _PARTS[variant], rank, top)
        return adapter_of(files, self.name, deltas, rest, {"r": int(rank), "variant": variant, "n_bits": bits})

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        return {key: adapter.settings[key] for key in ("r", "variant", "n_bits")}

    def tensors(self, module: str, delta: IntLoRADelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`; codes as uint8, all else float32."""
        codes = {_BASE: delta.parts[_BASE].astype(np.uint8)}
        shaped = {name: part[:, None] if part.ndim == 1 else part for name, part in {**delta.parts, **codes}.items()}
        return {f"{module}.{name}": np.ascontiguousarray(part) for name, part in shaped.items()}


def _delta(where: str, given: dict[str, NDArray[Any]], wanted: tuple[str, ...], rank: float, top: int) -> IntLoRADelta:
    all_of(where, given, wanted)
    strange = sorted(set(given) - set(wanted))
    if strange:
        raise AdapterFileError(
            f"{where} has {strange[0]}, which a shifting IntLoRA has not.", hint="Write variant: mul, if it multiplies."
        )
    parts = {_BASE: given[_BASE], **floats(where, {name: given[name] for name in (_A, _B, _R)})}
    for name in wanted[4:]:  # columns, saved as [out, 1]
        column = given[name][:, 0] if given[name].ndim == 2 and given[name].shape[1] == 1 else given[name]
        check_finite(f"{where}.{name}", column)
        parts[name] = column
    check_finite(f"{where}.{_BASE}", parts[_BASE])
    (out, inn), r = parts[_R].shape, int(rank)
    shapes = {_A: (r, inn), _B: (out, r), _R: (out, inn), _BASE: (out, inn)}
    for name, part in parts.items():
        if part.shape != shapes.get(name, (out,)):
            raise AdapterFileError(
                f"{where}: {name} is {list(given[name].shape)}; with r = {r} and {_R} {[out, inn]} it would be "
                f"{list(shapes.get(name, (out, 1)))}.",
                hint="Its config and its weights do not belong together.",
            )
    parts = {name: part.astype(np.float32) for name, part in parts.items()}
    codes, zeros = parts[_BASE], parts[_ZERO]
    if (codes != np.rint(codes)).any() or (codes < 0).any() or (codes > top).any() or (zeros != np.rint(zeros)).any():
        raise AdapterFileError(
            f"{where}: {_BASE} or {_ZERO} holds what is no whole number of 0…{top}.",
            hint="The file is damaged, or n_bits is another.",
        )
    for name in (_SCALE, _SCALE2):
        if name in parts and not (parts[name] > 0).all():
            raise AdapterFileError(f"{where}: {name} is not above zero everywhere.", hint="The training diverged.")
    return IntLoRADelta(parts, top)


INTLORA = IntLoRA()
