"""The proof of every run: what an arm generates, held against a reference that shares no code with the runtimes."""
