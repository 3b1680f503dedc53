"""The methods that the papers compare with and that perfbench trains but never serves."""
