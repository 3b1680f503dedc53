"""The machine and the software that a run was measured on. Free of torch."""
