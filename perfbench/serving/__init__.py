"""`perfbench serve`: the engine of live traffic as a server that speaks OpenAI's protocol."""
