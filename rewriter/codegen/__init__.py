"""From what a variant computes to kernels: one formula becomes Triton source, C++ source and its own reference."""
