"""The families, a line each: what a method shares among modules, which fields it needs, what its change depends on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles, check_finite, check_shape
from ssh_deploy.adapters.peft_folder import CONFIG, adapter_of, module_shape
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.factoring import thin
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError
from ssh_deploy_peft_bridge.deltas import LayerChange, LayerDelta
from ssh_deploy_peft_bridge.one_module import OneModule
from ssh_deploy_peft_bridge.shared import tinylora_vectors

#: Patterns come from files: these could make `re` backtrack for years, and PEFT's users write none of them.
_SLOW = re.compile(r"\)[*+{]|\{|\\\d|[*+].*[*+].*[*+].*[*+]", re.DOTALL)
#: Tensors that are saved and not trained.
_FROZEN = re.compile(r"randlora_[AB]$|delora_w_norm$|tinylora_[ABP]$|unilora_scales_[AB]|_indices")
#: Fields of numbers that are no sizes.
_NO_SIZE = ("alpha", "seed", "scaling", "lambda")
_ELSE = "Merge it with PEFT (merge_and_unload) and deploy the merged model."


@dataclass(frozen=True, slots=True)
class Bridged:
    """A PEFT type read through PEFT's own layer.

    Attributes:
        name, peft_type: see `Family`.
        slots: ``lowrank`` where its change is a product of two thin matrices; it becomes one when it is read.
        prefix: that the names of its tensors begin with.
        needs: fields of the config that its formula reads; PEFT would take its own defaults for missing ones.
        alone: its change is the same for every weight.
        wide: its modules share tensors as large as the largest sides of them all.
        decomposes: its layer decomposes the weight when it is built, which is too slow to be tried when it is read.
        saved: field that must be true, or the file does not hold all, and why.
        refused: fields that ask for another method than this one.
    """

    name: str
    peft_type: str
    prefix: str
    needs: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    alone: bool = False
    wide: bool = False
    decomposes: bool = False
    saved: tuple[str, str] | None = None
    refused: tuple[str, ...] = ()

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`.

        Raises:
            AdapterFileError: fields or tensors missing, or refused by PEFT's layer.
        """
        self._check(files)
        modules, shared, rest = self._grouped(files)
        shapes = {m: check_shape(f"{files.folder}: {m}", module_shape(files, m)) for m in modules}
        widest = None
        if self.wide and shapes:
            widest = max(out for out, _ in shapes.values()), max(inn for _, inn in shapes.values())
        if self.peft_type == "TINYLORA":
            modules, shared = tinylora_vectors(files, modules, shared), {}
        alone = self.alone and files.config.get("init_weights") != "bat"  # MiSS's variant that multiplies the weight
        deltas = {}
        for path, tensors in modules.items():
            for name, tensor in {**tensors, **shared}.items():
                if tensor.dtype.kind not in "iu":
                    check_finite(f"{files.folder}: {name}", tensor)
            biased = self.peft_type in ("ROAD", "BEFT") or any(
                f"{path}.glora_{x}." in n for x in "CDE" for n in tensors
            )
            where = f"{files.folder}: {path}"
            module = OneModule(where, path, files.config, {**tensors, **shared}, shapes[path], widest, biased)
            trained = [t for n, t in tensors.items() if t.dtype.kind not in "iu" and not _FROZEN.search(n)]
            deltas[path] = self._delta(module, sum(int(t.size) for t in trained), alone=alone)
        return adapter_of(files, self.name, deltas, rest, self._settings(files))

    def _delta(self, module: OneModule, trained: int, *, alone: bool) -> Delta:
        if not alone:
            if not self.decomposes:
                module.merged()  # refused now, not in the middle of a merge
            return LayerChange(module, trained)
        dense = module.merged()[0].numpy()
        check_finite(module.where, dense)
        if not self.slots:
            return LayerDelta(module, trained)
        return thin(dense, trained=trained)

    def _check(self, files: AdapterFiles) -> None:
        where = f"{files.folder}/{CONFIG}"
        missing = [field for field in self.needs if files.config.get(field) is None]
        if missing:
            raise AdapterFileError(
                f"{where} has no {missing[0]}, which {self.peft_type} computes with.", hint="Save it again with PEFT."
            )
        bias = files.config.get("bias", "none")
        if bias != "none":
            raise AdapterFileError(
                f"{where}: bias is {bias!r:.40}: biases are trained beside the method, which is not covered.",
                hint=_ELSE,
            )
        if self.saved is not None and files.config.get(self.saved[0]) is not True:
            raise AdapterFileError(f"{where}: {self.saved[0]} is not true: {self.saved[1]}", hint="Save it with it.")
        asked = next((field for field in self.refused if files.config.get(field)), None)
        if asked is not None:
            raise AdapterFileError(
                f"{where}: {asked} is {files.config[asked]!r:.60}, which is not covered in {self.peft_type}.",
                hint=_ELSE,
            )
        largest = max((side for tensor in files.tensors.values() for side in tensor.shape), default=0)
        for field, value in files.config.items():
            if field.endswith("_pattern"):
                self._check_pattern(f"{where}: {field}", value or {}, largest)
            elif field in self.needs:
                self._check_size(f"{where}: {field}", field, value, largest)

    def _check_pattern(self, where: str, patterns: object, largest: int) -> None:
        if not isinstance(patterns, Mapping):
            raise AdapterFileError(f"{where} is {patterns!r:.80}, no object.", hint="Save it again.")
        for pattern, value in patterns.items():
            if len(pattern) > 500 or _SLOW.search(pattern):
                raise AdapterFileError(
                    f"{where}: {pattern!r:.80} could take for ever to match.",
                    hint="Write at most 500 characters, three of * and +, and none of them after a group.",
                )
            self._check_size(f"{where}: {pattern!r:.80}", "", value, largest)

    @staticmethod
    def _check_size(where: str, field: str, value: object, largest: int) -> None:
        """PEFT makes arrays of these sizes before it sees that the tensors are of others."""
        if isinstance(value, int) and value > largest and not any(word in field for word in _NO_SIZE):
            raise AdapterFileError(
                f"{where} is {value}; no tensor of the file has a side above {largest}.",
                hint="Its config and its weights do not belong together.",
            )

    def _grouped(
        self, files: AdapterFiles
    ) -> tuple[dict[str, dict[str, NDArray[Any]]], dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Tensors by module, those that modules share, and all others."""
        modules: dict[str, dict[str, NDArray[Any]]] = {}
        shared: dict[str, NDArray[Any]] = {}
        rest: dict[str, NDArray[Any]] = {}
        for name, tensor in files.tensors.items():
            parts = name.split(".")
            first = next((i for i, part in enumerate(parts) if part.startswith(self.prefix)), None)
            if first is None or not first:
                rest[name] = tensor
            elif parts[:first] == ["base_model"]:
                shared[name] = tensor
            else:
                modules.setdefault(".".join(parts[:first]), {})[name] = tensor
        return modules, shared, rest

    def _settings(self, files: AdapterFiles) -> dict[str, Any]:
        found = {field: files.config.get(field) for field in self.needs}
        return {k: v for k, v in found.items() if isinstance(v, int | float | str) and v}

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """Refused: what was read is what PEFT makes of the tensors, not the tensors."""
        raise AdapterMismatchError(
            f"{adapter.source}: a {self.peft_type} adapter is read, merged and converted, not written.",
            hint="Copy its folder, or convert it to another kind (--to ssh, sdctft, lora).",
        )

    def tensors(self, module: str, delta: Any) -> dict[str, NDArray[Any]]:
        """ΔW's numbers (for comparisons; `config` refuses to write them)."""
        return {f"{module}.delta": np.asarray(delta.dense())}


_LOWRANK = ("lowrank",)
_PROJECTED = "what is drawn from a seed, or worked out of the whole model, is not drawn again."
#: What LoRA's config brings to AdaLoRA's, all of it other methods.
_OTHERS = ("use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices", "arrow_config")
_OTHERS += ("alora_invocation_tokens", "use_qalora", "use_bdlora", "monteclora_config", "kasa_config", "velora_config")
_OTHERS += ("megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
ADALORA = Bridged("adalora", "ADALORA", "lora_", ("init_r", "lora_alpha"), _LOWRANK, alone=True, refused=_OTHERS)
BEFT = Bridged("beft", "BEFT", "beft_")
BOFT = Bridged("boft", "BOFT", "boft_", ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"))
C3A = Bridged("c3a", "C3A", "c3a_", ("block_size",), alone=True)
DEFT = Bridged("deft", "DEFT", "deft_", ("r", "decomposition_method"))
DELORA = Bridged("delora", "DELORA", "delora_", ("r",), _LOWRANK, alone=True)
FROD = Bridged("frod", "FROD", "frod_", decomposes=True, saved=("save_projection", _PROJECTED))
GLORA = Bridged("glora", "GLORA", "glora_", ("r", "config_A_B", "config_C", "config_D_E"))
GRALORA = Bridged("gralora", "GRALORA", "gralora_", ("r", "alpha", "gralora_k"), _LOWRANK, alone=True)
HIRA = Bridged("hira", "HIRA", "hira_", ("r",))
MISS = Bridged("miss", "MISS", "miss_", ("r", "mini_r", "init_weights"), _LOWRANK, alone=True)
OFT = Bridged("oft", "OFT", "oft_", ("oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms"))
OSF = Bridged("osf", "OSF", "osf_", decomposes=True)
PEANUT = Bridged("peanut", "PEANUT", "peanut_", ("r", "depth", "act_fn", "scaling"))
PSOFT = Bridged("psoft", "PSOFT", "psoft_", ("r", "psoft_alpha", "ab_svd_init", "psoft_svd"), decomposes=True)
PVERA = Bridged(
    "pvera", "PVERA", "pvera_", ("r",), _LOWRANK, alone=True, wide=True, saved=("save_projection", _PROJECTED)
)
RANDLORA = Bridged(
    "randlora",
    "RANDLORA",
    "randlora_",
    ("r", "randlora_alpha"),
    alone=True,
    wide=True,
    saved=("save_projection", _PROJECTED),
)
ROAD = Bridged("road", "ROAD", "road_", ("variant", "group_size"))
SUPERTUNING = Bridged(
    "supertuning", "SUPERTUNING", "supertuning_", alone=True, saved=("save_precomputed_indices", _PROJECTED)
)
TINYLORA = Bridged(
    "tinylora",
    "TINYLORA",
    "tinylora_",
    ("r", "u", "projection_seed"),
    _LOWRANK,
    alone=True,
    saved=("save_projection", _PROJECTED),
)
UNILORA = Bridged(
    "unilora", "UNILORA", "unilora_", ("r", "theta_d_length"), _LOWRANK, alone=True, saved=("save_indices", _PROJECTED)
)
VBLORA = Bridged("vblora", "VBLORA", "vblora_", ("r", "num_vectors", "vector_length", "topk"), _LOWRANK, alone=True)
