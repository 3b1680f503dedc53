"""What `perfbench verify` does on the device: kernels against fp64 references, the runtimes against each other."""
