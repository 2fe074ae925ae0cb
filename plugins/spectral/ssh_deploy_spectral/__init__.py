"""Spectral adapters other than SSH and sDCTFT, which the core reads itself."""
