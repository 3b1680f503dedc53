"""How each method's adapters are read from, and written as, a PEFT checkpoint folder."""
