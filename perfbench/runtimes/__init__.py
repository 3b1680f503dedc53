"""How tokens are generated: one module for each runtime."""
