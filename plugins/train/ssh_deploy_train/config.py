"""What a user chooses: `SSHConfig` and `SDCTFTConfig`, as saved in adapter_config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig

from ssh_deploy.transforms import get_transform
from ssh_deploy_train.peft_types import SDCTFT, SSH


@dataclass
class SpectralConfig(PeftConfig):
    """Fields that both methods share.

    Attributes:
        n_frequency: trained coefficients per weight, 1 … out·in.
        scaling: α. SSH: ``ΔW = α/(MN)·C_M S C_N``; sDCTFT: ``ΔW = α·iDCT2(S)``, orthonormal.
        transform: ``hartley`` or ``hartley-joint`` (SSH), ``cosine`` (sDCTFT).
        delta_ratio: share δ of the coefficients that go where the base's spectrum is largest; the rest at random.
        seed: of the random part; every weight draws its own places.
        target_modules: names, a regular expression, or None for the architecture's usual ones.
        exclude_modules: names or a regular expression that `target_modules` must not reach.
        modules_to_save: modules trained whole beside the spectra (a classifier head).
        layers_to_transform, layers_pattern: restrict to some layers, as in every PEFT method.
        fan_in_fan_out: kept for PEFT; whether a weight is stored [in, out] is seen from its layer.
        module_shapes: filled in: {module path: [out, in]}, so that the file can be checked without its base.
        labels: class names in the order of the head's rows; filled in from the model's ``id2label`` where it has
            names of its own.
    """

    n_frequency: int = field(default=750, metadata={"help": "Trained coefficients per weight."})
    scaling: float = field(default=150.0, metadata={"help": "The adapter's scaling α."})
    transform: str = field(default="hartley", metadata={"help": "2-D transform of the spectrum."})
    delta_ratio: float = field(default=0.7, metadata={"help": "Share of coefficients chosen by energy."})
    seed: int = field(default=0, metadata={"help": "Seed of the randomly chosen coefficients."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained whole."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Seen from the layer; kept for PEFT."})
    module_shapes: dict[str, list[int]] | None = field(default=None, metadata={"help": "Filled in: shapes."})
    labels: list[str] | None = field(default=None, metadata={"help": "Class names of the head."})

    transforms: ClassVar[tuple[str, ...]] = ()
    #: ``backward``: the bare basis times 1/(MN); ``ortho``: the orthonormal basis.
    norm: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: with the field, its value and what it may be.
        """
        super().__post_init__()  # type: ignore[no-untyped-call]
        if isinstance(self.n_frequency, bool) or not isinstance(self.n_frequency, int) or self.n_frequency <= 0:
            raise ValueError(f"n_frequency is {self.n_frequency!r}; it must be a positive whole number.")
        if not isinstance(self.scaling, int | float) or not math.isfinite(self.scaling):
            raise ValueError(f"scaling is {self.scaling!r}; it must be a finite number.")
        if self.transform not in self.transforms:
            raise ValueError(f"transform is {self.transform!r}; {self.peft_name()} knows {', '.join(self.transforms)}.")
        if not 0 <= self.delta_ratio <= 1:
            raise ValueError(f"delta_ratio is {self.delta_ratio!r}; it is a share, 0 to 1.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number, 0 or more.")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError("layers_to_transform and layers_pattern cannot be used when target_modules is a string.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform.")
        get_transform(self.transform)  # a broken or missing transform is reported now, not in the first forward
        for field_name in ("target_modules", "exclude_modules"):  # PEFT compares these as sets
            if isinstance(names := getattr(self, field_name), list):
                setattr(self, field_name, set(names))

    @classmethod
    def peft_name(cls) -> str:
        """``SSH`` or ``SDCTFT``."""
        return cls.__name__.removesuffix("Config")


@dataclass
class SSHConfig(SpectralConfig):
    """Sparse Hartley spectra: ``ΔW = α/(MN) · C_M S C_N`` (``hartley``) or the joint form (``hartley-joint``)."""

    transforms: ClassVar[tuple[str, ...]] = ("hartley", "hartley-joint")
    norm: ClassVar[str] = "backward"

    def __post_init__(self) -> None:
        """See `SpectralConfig`."""
        super().__post_init__()
        self.peft_type = SSH


@dataclass
class SDCTFTConfig(SpectralConfig):
    """Sparse cosine spectra: ``ΔW = α · iDCT2(S)``, places chosen in three distance bands."""

    n_frequency: int = field(default=700, metadata={"help": "Trained coefficients per weight."})
    scaling: float = field(default=1.0, metadata={"help": "The adapter's scaling α."})
    transform: str = field(default="cosine", metadata={"help": "2-D transform of the spectrum."})

    transforms: ClassVar[tuple[str, ...]] = ("cosine",)
    norm: ClassVar[str] = "ortho"

    def __post_init__(self) -> None:
        """See `SpectralConfig`."""
        super().__post_init__()
        self.peft_type = SDCTFT
