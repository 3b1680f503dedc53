"""The methods that PEFT lacks, as PEFT types: importing a module of this folder makes its type known to PEFT."""
