"""MT-Bench: its questions, the judge that rates the answers, and how the judge is asked."""
