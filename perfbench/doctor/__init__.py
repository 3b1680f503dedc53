"""`perfbench doctor`: what this machine can and can't do, told with the standard library alone where it must be."""
