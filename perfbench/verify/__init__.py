"""`perfbench verify`: the proof that what is fast is also right, and what it is faster than, in one command."""
