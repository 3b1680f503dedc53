"""What each figure means, statistics over repetitions, the roof, and the papers' own numbers. Free of torch."""
