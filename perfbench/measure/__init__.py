"""The parent process of a run: it starts the children that measure, and writes what they report. Free of torch."""
