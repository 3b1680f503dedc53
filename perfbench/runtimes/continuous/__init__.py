"""Runtime `continuous`: requests join and leave between decode steps."""
