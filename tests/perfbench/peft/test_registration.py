"""`import perfbench.peft` alone makes our types known to PEFT, whichever of its files comes first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OPEN = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
{imports}
import peft
torch.manual_seed(0)
shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
model = peft.PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**shape)), sys.argv[1])
print(type(model.base_model).__name__, model.peft_config["default"].peft_type.value)
"""


def opened(imports: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", OPEN.format(imports=imports), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each of our types for the shape above."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    import perfbench.peft as ours

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("peft")
    for name, config in (("PARA", ours.ParaConfig(rank=2)), ("PROJECTED_IA3", ours.ProjectedIa3Config(dim=2))):
        bare = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32))
        peft.get_peft_model(bare, config).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("imports", ["import perfbench.peft", "import perfbench.peft.projected_ia3"])
@pytest.mark.parametrize(("kind", "model"), [("PARA", "ParaModel"), ("PROJECTED_IA3", "ProjectedIa3Model")])
def test_a_checkpoint_opens_with_peft_itself(saved: Path, imports: str, kind: str, model: str) -> None:
    done = opened(imports, saved / kind)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [model, kind]


def test_without_the_import_peft_does_not_know_it(saved: Path) -> None:
    done = opened("", saved / "PARA")
    assert done.returncode != 0
    assert "PARA" in done.stderr
