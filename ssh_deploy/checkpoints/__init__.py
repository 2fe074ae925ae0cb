"""Hugging Face checkpoints as streams of tensors."""
