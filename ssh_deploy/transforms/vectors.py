"""Vectors of sixteen numbers as a type of numba: loads, stores, the three operations, halfs, and a 16×16 turned.

LLVM does not find vectors by itself in loops like those of `transforms.compiled`: it cannot know that four places of
one array are not the same. So they are written down, and LLVM makes of each what the processor has (one register of
AVX-512, two of AVX2, four of NEON).

Numba keeps what it compiled until the file of the outermost function changes, which is `transforms.compiled`: who
edits here or in `transforms.stages` deletes ``__pycache__``. (Tests keep theirs apart by the files' contents.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
LINE = 64  # bytes of a line of the cache
TILE = 64  # columns of the tile that `turn` fills: 256 bytes of float32
NATIVE, HALF, BFLOAT = 0, 1, 2  # what the numbers of an array are: its dtype's, or halfs in uint16

_INDEX = ir.IntType(64)


def inlined(function: Callable[..., Any]) -> Any:
    """As `jit`, for inner loops: it becomes part of its caller.

    Otherwise each call counts a reference for every array that it hands over, which takes longer than the work.
    """
    return jit(function, forceinline=True)


def jit(function: Callable[..., Any], **also: bool) -> Any:
    """Compiled by numba at first use, to run without the interpreter's lock.

    The machine code is kept beside the function's file or in the user's cache, where one of them can be written.
    """
    options = {"nogil": True, "error_model": "numpy", **also}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no place to keep it
        return njit(**options)(function)


class Vector(types.Type):
    """`LANES` numbers of ``dtype``."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, _vector(ir.FloatType() if fe_type.dtype == types.float32 else ir.DoubleType()))


def _vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def _constant(bits: int, value: int) -> ir.Constant:
    return ir.Constant(_vector(ir.IntType(bits)), [value] * LANES)


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: ir.VectorType) -> Any:
    data = context.make_array(kind)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


@intrinsic
def load(_: Any, array: Any, index: Any) -> Any:
    """``array[index : index + LANES]`` of a contiguous array."""
    vector = Vector(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(vector)
        return builder.load(_address(context, builder, signature.args[0], args[0], args[1], kind), align=2)

    return vector(array, types.intp), generate


@intrinsic
def load_back(_: Any, array: Any, index: Any) -> Any:
    """``array[index : index + LANES]``, the last first."""
    vector = Vector(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(vector)
        found = builder.load(_address(context, builder, signature.args[0], args[0], args[1], kind), align=2)
        back = ir.Constant(_vector(ir.IntType(32)), list(range(LANES))[::-1])
        return builder.shuffle_vector(found, ir.Constant(kind, ir.Undefined), back)

    return vector(array, types.intp), generate


@intrinsic
def every(_: Any, array: Any, index: Any) -> Any:
    """``array[index]`` in every lane."""
    vector = Vector(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, value=args[0]).data
        kind = context.get_value_type(vector)
        nothing = ir.Constant(kind, ir.Undefined)
        first = builder.insert_element(nothing, builder.load(builder.gep(data, [args[1]])), ir.Constant(_INDEX, 0))
        return builder.shuffle_vector(first, nothing, _constant(32, 0))

    return vector(array, types.intp), generate


@intrinsic
def expect(_: Any, array: Any, index: Any) -> Any:
    """Ask for the line of the cache with ``array[index]``, to be read when the first cache has been overwritten."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, value=args[0]).data
        address, number = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer()), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", fnty=kind)
        builder.call(prefetch, [address, number(0), number(2), number(1)])  # to read, into the second cache, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def store(_: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index : index + LANES] = value``, rounded to float32 where the array is that."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(Vector(array.dtype))
        given = args[2] if array.dtype == value.dtype else builder.fptrunc(args[2], kind)
        builder.store(given, _address(context, builder, signature.args[0], args[0], args[1], kind), align=2)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


def _reader(widened: Callable[[Any, Any], Any]) -> Any:
    """Intrinsic: halfs in uint16 at an index as float32, by ``widened(builder, bits in int32)``."""

    @intrinsic
    def read_halfs(_: Any, array: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = _address(context, builder, signature.args[0], args[0], args[1], _vector(ir.IntType(16)))
            return widened(builder, builder.zext(builder.load(address, align=2), _vector(ir.IntType(32))))

        return Vector(types.float32)(array, types.intp), generate

    return read_halfs


def _writer(narrowed: Callable[[Any, Any], Any]) -> Any:
    """Intrinsic: float32 numbers as halfs in uint16 at an index, by ``narrowed(builder, numbers)``, bits in int32."""

    @intrinsic
    def write_halfs(_: Any, array: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = _address(context, builder, signature.args[0], args[0], args[1], _vector(ir.IntType(16)))
            builder.store(builder.trunc(narrowed(builder, args[2]), _vector(ir.IntType(16))), address, align=2)
            return context.get_dummy_value()

        return types.void(array, types.intp, value), generate

    return write_halfs


def _half_widened(builder: Any, bits: Any) -> Any:
    """float16: exponents are 112 less. By integers, for not every processor has this of its own."""
    moved = builder.shl(builder.and_(bits, _constant(32, 0x7FFF)), _constant(32, 13))
    scale = ir.Constant(_vector(ir.FloatType()), [2.0**112] * LANES)
    scaled = builder.bitcast(builder.fmul(builder.bitcast(moved, scale.type), scale), moved.type)
    no_number = builder.icmp_unsigned(">=", moved, _constant(32, 0x7C00 << 13))
    found = builder.select(no_number, builder.or_(moved, _constant(32, 0x7F800000)), scaled)
    sign = builder.shl(builder.and_(bits, _constant(32, 0x8000)), _constant(32, 16))
    return builder.bitcast(builder.or_(found, sign), scale.type)


def _half_narrowed(builder: Any, numbers: Any) -> Any:
    """float16, to nearest even; no number stays none."""
    bits = builder.bitcast(numbers, _vector(ir.IntType(32)))
    size = builder.and_(bits, _constant(32, 0x7FFFFFFF))
    # below 2⁻¹⁴ the last bit is 2⁻²⁴, which is that of 0.5 in float32: the sum is rounded there
    half = ir.Constant(_vector(ir.FloatType()), [0.5] * LANES)
    added = builder.fadd(builder.bitcast(size, half.type), half)
    small = builder.sub(builder.bitcast(added, size.type), _constant(32, 0x3F000000))
    odd = builder.and_(builder.lshr(size, _constant(32, 13)), _constant(32, 1))
    fewer = builder.add(size, _constant(32, 0xFFF - (112 << 23)))  # the exponent, and half of the last bit less one
    normal = builder.lshr(builder.add(fewer, odd), _constant(32, 13))
    found = builder.select(builder.icmp_unsigned("<", size, _constant(32, 0x38800000)), small, normal)
    beyond = builder.icmp_unsigned(">=", size, _constant(32, 0x477FF000))  # 65,520
    found = builder.select(beyond, _constant(32, 0x7C00), found)
    no_number = builder.icmp_unsigned(">", size, _constant(32, 0x7F800000))
    found = builder.select(no_number, _constant(32, 0x7E00), found)
    return builder.or_(found, builder.lshr(builder.and_(bits, _constant(32, -(1 << 31))), _constant(32, 16)))


def _bfloat_widened(builder: Any, bits: Any) -> Any:
    """bfloat16: the upper half."""
    return builder.bitcast(builder.shl(bits, _constant(32, 16)), _vector(ir.FloatType()))


def _bfloat_narrowed(builder: Any, numbers: Any) -> Any:
    """bfloat16, to nearest even; no number stays none."""
    bits = builder.bitcast(numbers, _vector(ir.IntType(32)))
    upper = builder.lshr(bits, _constant(32, 16))
    half = builder.add(builder.and_(upper, _constant(32, 1)), _constant(32, 0x7FFF))
    rounded = builder.lshr(builder.add(bits, half), _constant(32, 16))
    odd = builder.fcmp_unordered("uno", numbers, numbers)
    return builder.select(odd, builder.or_(upper, _constant(32, 0x40)), rounded)


_load_half, _store_half = _reader(_half_widened), _writer(_half_narrowed)
_load_bfloat, _store_bfloat = _reader(_bfloat_widened), _writer(_bfloat_narrowed)


def _operation(instruction: str) -> Any:
    @intrinsic
    def of_two(_: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            # a product and a sum may become one instruction; no other freedom
            return getattr(builder, instruction)(*args, flags=("contract",))

        return left(left, right), generate

    return of_two


def _overload(symbol: Callable[[Any, Any], Any], instruction: str) -> None:
    of_two = _operation(instruction)

    @overload(symbol, strict=False)
    def _(left: Any, right: Any) -> Any:
        if isinstance(left, Vector) and left == right:
            return lambda left, right: of_two(left, right)  # noqa: PLW0108 (numba wants a function of its own)
        return None


for _symbol, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _overload(_symbol, _instruction)


def _put_turned(context: Any, builder: Any, kind: Any, tile: Any, column: Any, lines: list[Any]) -> None:
    """``tile[r, column + c] = lines[c][r]``."""
    bit = LANES // 2
    while bit:  # blocks of 8, 4, 2 and 1 change sides: four rounds for any 16×16
        low = [lane if not lane & bit else LANES + (lane ^ bit) for lane in range(LANES)]
        high = [lane | bit if not lane & bit else LANES + lane for lane in range(LANES)]
        for i in (i for i in range(LANES) if not i & bit):
            pair = lines[i], lines[i | bit]
            for j, mask in ((i, low), (i | bit, high)):
                lines[j] = builder.shuffle_vector(*pair, ir.Constant(_vector(ir.IntType(32)), mask))
        bit //= 2
    for row, line in enumerate(lines):
        at = builder.add(column, ir.Constant(_INDEX, row * TILE))
        builder.store(line, _address(context, builder, kind, tile, at, line.type), align=2)


@intrinsic
def turn(_: Any, z: Any, part: Any, order: Any, first: Any, tile: Any, column: Any) -> Any:
    """``tile[r, column + c] = z[order[first + c] + part + r]`` for r, c < LANES; ``tile`` has `TILE` columns."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(Vector(z.dtype))
        places = context.make_array(signature.args[2])(context, builder, value=args[2]).data
        lines = []
        for lane in range(LANES):
            place = builder.load(builder.gep(places, [builder.add(args[3], ir.Constant(_INDEX, lane))]))
            at = builder.add(place, args[1])
            lines.append(builder.load(_address(context, builder, signature.args[0], args[0], at, kind), align=2))
        _put_turned(context, builder, signature.args[4], args[4], args[5], lines)
        return context.get_dummy_value()

    return types.void(z, types.intp, order, types.intp, tile, types.intp), generate


def _mirrored_turn(instruction: str, left: tuple[bool, int], right: tuple[bool, int]) -> Any:
    """Intrinsic: `turn` of sums or differences of places j and n−j, the mirror of which 0 is its own.

    ``left``, ``right``: whether it is the mirror, and from which of a place's numbers on.
    """

    @intrinsic
    def turn_two(_: Any, z: Any, n: Any, first: Any, tile: Any, column: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = context.get_value_type(Vector(z.dtype))

            def found(place: Any, part: int) -> Any:
                at = builder.add(builder.mul(place, ir.Constant(_INDEX, 2 * LANES)), ir.Constant(_INDEX, part))
                return builder.load(_address(context, builder, signature.args[0], args[0], at, kind), align=2)

            lines = []
            for lane in range(LANES):
                place = builder.add(args[2], ir.Constant(_INDEX, lane))
                mirror = builder.sub(args[1], place)
                if lane == 0:
                    mirror = builder.select(builder.icmp_signed("==", place, ir.Constant(_INDEX, 0)), place, mirror)
                sides = [found(mirror if mirrored else place, part) for mirrored, part in (left, right)]
                lines.append(getattr(builder, instruction)(*sides))
            _put_turned(context, builder, signature.args[3], args[3], args[4], lines)
            return context.get_dummy_value()

        return types.void(z, types.intp, types.intp, tile, types.intp), generate

    return turn_two


turn_sums = _mirrored_turn("fadd", (False, 0), (True, LANES))  # Re Z_j + Im Z_{n−j}
turn_differences = _mirrored_turn("fsub", (True, 0), (False, LANES))  # Re Z_{n−j} − Im Z_j


def read(array: Any, index: int, kind: int) -> Any:
    """As `load`; of uint16, what the halfs of ``kind`` are in float32. In compiled code only."""
    raise NotImplementedError


def write(array: Any, index: int, value: Any, kind: int) -> None:
    """As `store`; into uint16 rounded to halfs of ``kind``. In compiled code only."""
    raise NotImplementedError


@overload(read, strict=False)
def _(array: Any, index: Any, kind: Any) -> Any:
    if array.dtype != types.uint16:
        return lambda array, index, kind: load(array, index)
    return lambda array, index, kind: _load_half(array, index) if kind == HALF else _load_bfloat(array, index)


@overload(write, strict=False)
def _(array: Any, index: Any, value: Any, kind: Any) -> Any:
    if array.dtype != types.uint16:
        return lambda array, index, value, kind: store(array, index, value)

    def narrow(array: Any, index: Any, value: Any, kind: Any) -> None:
        if kind == HALF:
            _store_half(array, index, value)
        else:
            _store_bfloat(array, index, value)

    return narrow


@lru_cache(maxsize=16)
def kind_of(dtype: np.dtype[Any]) -> int | None:
    """How an array's numbers are read and written; None: not at all."""
    if dtype in (np.float32, np.float64):
        return NATIVE
    return {"float16": HALF, "bfloat16": BFLOAT}.get(dtype.name)
