"""SSH and sDCTFT as Hugging Face PEFT methods; importing this registers the PEFT types ``SSH`` and ``SDCTFT``."""

from __future__ import annotations

from ssh_deploy_train.config import SDCTFTConfig, SSHConfig
from ssh_deploy_train.layer import SSHLayer, SSHLinear
from ssh_deploy_train.model import SDCTFTModel, SSHModel
from ssh_deploy_train.register import register_methods

__all__ = ["SDCTFTConfig", "SDCTFTModel", "SSHConfig", "SSHLayer", "SSHLinear", "SSHModel"]

register_methods({"SSH": (SSHConfig, SSHModel), "SDCTFT": (SDCTFTConfig, SDCTFTModel)})
