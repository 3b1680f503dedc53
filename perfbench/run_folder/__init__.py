"""A run on disk: its files, their schema, and the lock of the one process that writes them. Free of torch."""
