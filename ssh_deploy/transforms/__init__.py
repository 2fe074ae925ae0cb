"""Orthonormal transforms and how to run them; they know no adapters."""

from __future__ import annotations

from functools import cache
from typing import cast

from ssh_deploy import registry
from ssh_deploy.transforms.base import Transform

GROUP = "ssh_deploy.transforms"


@cache  # reading install metadata costs 5 ms; a delta asks twice
def get_transform(name: str) -> Transform:
    """The transform that goes by ``name``: ``hartley``, ``hartley-joint``, ``cosine`` or ``fourier``.

    Raises:
        RegistryError: unknown name; the installed ones are listed.
    """
    return cast("Transform", registry.load(GROUP, name))


def transform_names() -> list[str]:
    """Names of the installed transforms; nothing is imported."""
    return sorted(registry.claims(GROUP))
