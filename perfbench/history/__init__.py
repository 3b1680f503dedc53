"""How figures moved over runs: the store of run folders, and its table, CSV and page. Free of torch."""
