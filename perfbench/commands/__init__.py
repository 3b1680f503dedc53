"""The commands, by what they are for. Each imports what it needs, so that `--help` and `validate` answer in a blink."""
