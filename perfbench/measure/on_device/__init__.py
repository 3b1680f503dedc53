"""The child process that measures: its arms, its prompts, timed repetitions, memory and counts."""
