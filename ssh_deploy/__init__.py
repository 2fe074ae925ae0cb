"""ssh-deploy: compact spectral adapters merged into checkpoints, exported to ONNX, swapped at run time.

SSH here is Sparse Spectrum adaptation via the discrete Hartley transform; it has nothing to do with Secure
Shell. Importing this package imports neither torch, transformers nor onnxruntime: public names load on use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssh_deploy.adapters.base import Adapter as Adapter
    from ssh_deploy.adapters.reading import read_adapter as read_adapter
    from ssh_deploy.errors import DeployError as DeployError
    from ssh_deploy.jobs.swapping import swap as swap
    from ssh_deploy.runtimes.deployment import Deployment as Deployment
    from ssh_deploy.runtimes.sampling import Sampling as Sampling

__version__ = "0.1.0"

_PUBLIC = {
    "Adapter": "ssh_deploy.adapters.base",
    "Deployment": "ssh_deploy.runtimes.deployment",
    "DeployError": "ssh_deploy.errors",
    "Sampling": "ssh_deploy.runtimes.sampling",
    "read_adapter": "ssh_deploy.adapters.reading",
    "swap": "ssh_deploy.jobs.swapping",
}

__all__ = ["Adapter", "DeployError", "Deployment", "Sampling", "__version__", "read_adapter", "swap"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
