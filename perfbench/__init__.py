"""perfbench: what each adapter method costs when one language model serves many tenants."""

__version__ = "0.1.0"
