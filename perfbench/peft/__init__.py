"""The methods that PEFT lacks, as PEFT types. Importing this folder, or any file of it, makes all of them known:

import peft, perfbench.peft

model = peft.PeftModel.from_pretrained(base, "a PARA checkpoint")
model = peft.get_peft_model(base, perfbench.peft.ParaConfig(rank=12))
"""

from perfbench.peft.para import ParaConfig
from perfbench.peft.projected_ia3 import ProjectedIa3Config

__all__ = ["ParaConfig", "ProjectedIa3Config"]
