"""`perfbench report`: one or several runs as a page that opens offline, as Markdown, CSV or Parquet. Free of torch."""
