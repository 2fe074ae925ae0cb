"""What the banks add to the products of the sites, put behind an If: an absent adapter costs that and no more.

What follows a group's products on its own (`tails`: heads taken apart, a gate, a residual) moves into the branches of
the last kind's If, behind an Add where an adapter is there. Elsewhere the contribution is added with ScatterND(add)
onto the batch rows: its first input is updated in place, the bias stays where ORT fuses it with what follows, and with
no adapter the indices are empty (Add of a zero would also turn −0 into 0). The indices are distinct: no two threads
meet on a row.

Graphs that read single tokens ask two questions, an If each: is an adapter there, is it one token a batch row? An If
between two layers costs some 7 µs, of SmolLM2's token 0.03 %. With a group or less a layer (query and value) the
adapter is asked for first: what is absent is not to be felt. With more (all seven matrices) the length is: a token with
its adapter then passes one If a group and not two, and one without pays for that.

For the same reason a group that reads what another's tail makes (down_proj, behind the gate) has no If of its own: what
it contributes is added to its residual, in the branches where its activation is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from ssh_deploy.graph.emitter import Constants, Emitter
from ssh_deploy.graph.lowering import lowrank, sided, sparse, spectral, spectral_bank
from ssh_deploy.graph.sites import Call
from ssh_deploy.graph.tails import Tail, rename_output, replace_tail, tails_of

Bank = spectral_bank.SpectralBank | lowrank.LowRankBank | sparse.SparseBank | sided.SidedBank


@dataclass(frozen=True, slots=True, eq=False)
class _Follower:
    """A ``call`` that reads the result of ``tail``; its product goes to ``join``, an Add to the known ``residual``."""

    tail: Tail
    call: Call
    join: ir.Node
    residual: ir.Value


@dataclass(frozen=True, slots=True, eq=False)
class Filler:
    """Adds what ``banks`` contribute to ``graph``, group by group in its order.

    ``table``: row of each module among the sites; ``places``: see `site_places`; ``order``: of the nodes that were
    traced, by id.
    """

    graph: ir.Graph
    constants: Constants
    banks: Sequence[Bank]
    table: Mapping[str, int]
    places: Mapping[str, tuple[int, int]]
    order: Mapping[int, int]

    def fill(self, groups: Sequence[Sequence[Call]]) -> None:
        """Add the contributions of all banks to the results of all calls."""
        done: Sequence[Call] | None = None
        for group, following in pairwise([*groups, []]):
            for bank in self.banks[:-1]:
                self._add(bank, group, [Tail((_current(call),)) for call in group])
            if self.banks and group is not done:
                tails = tails_of([_current(call) for call in group], partial(self._is_before, group))
                follower = self._follower(group, tails, following)
                done = following if follower else None
                self._add(self.banks[-1], group, tails, follower)

    def _add(self, bank: Bank, group: Sequence[Call], tails: Sequence[Tail], follower: _Follower | None = None) -> None:
        """Add what one bank contributes to a group, and to a follower's residual, in the branches of one If."""
        kind = bank.axis if isinstance(bank, spectral_bank.SpectralBank) else bank.kind
        emitter = Emitter(self.constants, f"adapter/{kind}/{group[0].module}")
        calls = {_current(call): call for call in group}
        users = {product: list(product.uses()) for product in calls}
        then, other = emitter.branch("there"), emitter.branch("absent")
        there = self._joined(then, bank, calls, tails, follower)
        none = other.const(np.zeros(0), np.int64)
        absent = [tail.copied(other) if tail.nodes else other.op("Gather", tail.result, none, axis=0) for tail in tails]
        absent += [other.op("Identity", follower.residual)] if follower else []
        single = spectral.single_gate(bank, group) if isinstance(bank, spectral_bank.SpectralBank) else None
        if single is None:
            sums = emitter.when(bank.gate, then, there, other, absent, dtype=ir.DataType.FLOAT)
        else:
            assert isinstance(bank, spectral_bank.SpectralBank)
            token, inner = emitter.branch("token"), emitter.branch("rest")
            alone = self._joined_token(token, bank, calls, tails, follower)
            if bank.gate_first:
                rest = inner.when(single, token, alone, then, there, dtype=ir.DataType.FLOAT)
                sums = emitter.when(bank.gate, inner, rest, other, absent, dtype=ir.DataType.FLOAT)
            else:
                rest = inner.when(bank.gate, then, there, other, absent, dtype=ir.DataType.FLOAT)
                sums = emitter.when(single, token, alone, inner, rest, dtype=ir.DataType.FLOAT)
        self.graph.extend(emitter.nodes)  # sorted in the end
        if follower:
            sums[-1].shape = follower.residual.shape
            follower.join.replace_input_with(list(follower.join.inputs).index(follower.residual), sums[-1])
        for tail, value in zip(tails, sums[: len(tails)], strict=True):
            if tail.nodes:
                replace_tail(self.graph, tail, value)
                continue
            product = tail.result
            add = Emitter(self.constants, f"adapter/{kind}/{calls[product].module}/add")
            total = add.op("ScatterND", product, bank.batch, value, reduction="add")
            total.shape, total.dtype = product.shape, ir.DataType.FLOAT
            producer = product.producer()
            assert producer is not None
            self.graph.insert_after(producer, add.nodes)
            for node, i in users[product]:
                node.replace_input_with(i, total)
            rename_output(self.graph, product, total)

    def _joined(
        self,
        emitter: Emitter,
        bank: Bank,
        calls: Mapping[ir.Value, Call],
        tails: Sequence[Tail],
        follower: _Follower | None,
    ) -> list[ir.Value]:
        """What ``tails`` make of the products of ``calls``, and the residual, with an adapter; in a branch."""
        group = [*calls.values()]
        if isinstance(bank, spectral_bank.SpectralBank):
            terms = spectral.contribution(emitter, bank, group, self.table)
        elif isinstance(bank, sparse.SparseBank):
            terms = sparse.contribution(emitter, bank, group, self.table)
        elif isinstance(bank, sided.SidedBank):
            terms = sided.answered(emitter, bank, group, [*calls])
        else:
            terms = lowrank.contribution(emitter, bank, group, self.places)
        of_product = dict(zip(calls, terms, strict=True))
        found = [tail.joined(emitter, of_product) for tail in tails]
        if follower:
            assert isinstance(bank, spectral_bank.SpectralBank)
            read = found[tails.index(follower.tail)]
            (term,) = spectral.contribution(emitter, bank, [follower.call], self.table, read=read)
            found.append(emitter.op("Add", follower.residual, term))
        return found

    def _joined_token(
        self,
        emitter: Emitter,
        bank: spectral_bank.SpectralBank,
        calls: Mapping[ir.Value, Call],
        tails: Sequence[Tail],
        follower: _Follower | None,
    ) -> list[ir.Value]:
        """As `_joined`, for one token a batch row."""
        sides = {product: tail.token_sides(calls[product].outputs) for tail in tails for product in tail.products}
        group = [*calls.values()]
        terms = spectral.single_contribution(emitter, bank, group, self.table, [sides[each] for each in calls])
        of_product = dict(zip(calls, terms, strict=True))
        found = [tail.joined_token(emitter, of_product) for tail in tails]
        if follower:
            own, read = (1, follower.call.outputs), found[tails.index(follower.tail)]
            (term,) = spectral.single_contribution(emitter, bank, [follower.call], self.table, [own], read=read)
            found.append(emitter.op("Add", follower.residual, term))
        return found

    def _follower(self, group: Sequence[Call], tails: Sequence[Tail], following: Sequence[Call]) -> _Follower | None:
        """``following`` if its one product is only added to what was there before ``group``, and reads a tail's result.

        Of spectra: what scales a product cannot do without it.
        """
        bank = self.banks[-1]
        if len(following) != 1 or not isinstance(bank, spectral_bank.SpectralBank):
            return None
        call, product = following[0], _current(following[0])
        users = list(product.consumers())
        tail = next((tail for tail in tails if tail.nodes and tail.result is call.activation), None)
        if tail is None or tail.heads or [node.op_type for node in users] != ["Add"] or product.is_graph_output():
            return None
        residual = next((value for value in users[0].inputs if value is not product), None)
        if residual is None or not self._is_before(group, residual):
            return None
        if (spectral.single_gate(bank, group) is None) != (spectral.single_gate(bank, following) is None):
            return None
        return _Follower(tail, call, users[0], residual)

    def _is_before(self, group: Sequence[Call], value: ir.Value) -> bool:
        """Whether ``value`` is no constant and made before any product of ``group``."""
        producer = value.producer()
        if producer is None:
            return value.is_graph_input() and not value.is_initializer()
        # what was made since is of groups before
        return self.order.get(id(producer), -1) < min(self.order[id(call.nodes[0])] for call in group)


def _current(call: Call) -> ir.Value:
    """The call's product with the contributions added so far."""
    value = call.product
    while True:
        following = [n for n in value.consumers() if n.op_type == "ScatterND" and (n.name or "").startswith("adapter/")]
        if not following:
            return value
        value = following[0].outputs[0]
