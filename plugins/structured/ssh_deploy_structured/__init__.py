"""Structured adapters for ssh-deploy: scales (SSF, Propulsion, IA3), reflections (ETHER, HRA), sparse (SPT, SHiRA)."""
