"""Tasks: one file each, and `registry.TASKS`."""
