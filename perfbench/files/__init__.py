"""Files and paths that people bring: read strictly, printed safely, written whole or not at all. Free of torch."""
