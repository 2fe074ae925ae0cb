"""Adapter files to deltas and back."""
