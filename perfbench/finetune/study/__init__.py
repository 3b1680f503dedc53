"""Studies: search, settings, training and judging chained by one file, with one table and one picture at the end."""
