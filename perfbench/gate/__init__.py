"""Comparisons that carry a verdict: stored runs (`compare`, `gate`) and two revisions side by side (`ab`)."""
