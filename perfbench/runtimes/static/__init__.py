"""Runtime `static`: our own decode loop for the Llama family, over fused weights and a cache of fixed size."""
