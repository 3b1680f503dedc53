"""What a profile records in the child process: a trace, the memory over time, and the time of each operation."""
