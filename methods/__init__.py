"""The adapter methods that perfbench serves: one file each, all of them made into the same layer plan."""
