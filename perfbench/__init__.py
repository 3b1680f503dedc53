"""perfbench: what each adapter method costs when one language model serves many tenants.

    import perfbench

    run = perfbench.run("smoke", set={"device": "cpu"})
    run.to_pandas()

Importing it loads no torch; a call that touches the device does. `perfbench.__all__` is what stays as it is.
"""

from perfbench.api import Accuracy, Run, Search, accuracy, load, run, search
from perfbench.errors import PerfbenchError

__version__ = "0.1.0"
__all__ = ["Accuracy", "PerfbenchError", "Run", "Search", "__version__", "accuracy", "load", "run", "search"]
