"""ΔW on NVIDIA GPUs: the sparse inverse transform fused with scale, cast and add, in Triton."""
