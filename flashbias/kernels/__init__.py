"""The Triton kernels of attention with a low-rank bias, and what the tuner must know of them."""
