"""The two papers' own numbers, to lay beside ours. Free of torch.

None is a number that the paper does not give, or that is illegible in the copy it was read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perfbench.errors import ScenarioError, nearest
from perfbench.methods.shape import MODULES


@dataclass(frozen=True)
class PaperRow:
    """`tokens_per_s` and peak memory in `mib` (MiB) of one method at one beam size."""

    tokens_per_s: float | None
    mib: int | None


@dataclass(frozen=True)
class Paper:
    """One table of one paper; `rows` is keyed by (method, beams), `settings` has the options that it ran.

    `speeds` says in a word why there are none, where that is so."""

    title: str
    machine: str
    rows: Mapping[tuple[str, int], PaperRow]
    settings: Mapping[str, Mapping[str, Any]]
    speeds: str = ""

    def row(self, method: str, beams: int, options: Mapping[str, Any]) -> PaperRow | None:
        """The paper's numbers for an arm, or None where it has none or ran the method with other options."""
        setting = self.settings.get(method, {})
        for name, value in setting.items():
            ours = options.get(name, value)
            # Read back from JSON, a tuple is a list.
            if (tuple(ours) if isinstance(ours, list) else ours) != value:
                return None
        return self.rows.get((method, beams))

    def versus_lora(self, method: str, beams: int) -> float | None:
        """The paper's tokens/s of `method` / those of its LoRA at the same beam size."""
        one, lora = self.rows.get((method, beams)), self.rows.get(("lora", beams))
        if one is None or lora is None or one.tokens_per_s is None or lora.tokens_per_s is None:
            return None
        return one.tokens_per_s / lora.tokens_per_s


PAPERS: dict[str, Paper] = {
    "para_table4": Paper(
        title="PARA, Table 4: LLaMA-2 7B, prompt 274, 32 new tokens, mean of 100 runs",
        machine="NVIDIA A40 48 GB",
        rows={
            ("lora", 1): PaperRow(25.1, 14616),
            ("lora", 3): PaperRow(21.9, 16104),
            ("ia3", 1): PaperRow(33.1, 14572),
            ("ia3", 3): PaperRow(27.6, 16036),
            ("para", 1): PaperRow(32.8, 14512),
            ("para", 3): PaperRow(27.6, 15986),
        },
        settings={"lora": {"rank": 4, "modules": MODULES}, "ia3": {"dim": 16}, "para": {"rank": 12}},
    ),
    "fanlora_table3": Paper(
        title="FanLoRA, Table 3: LLM-Assist 7B (proprietary), prompt 276, 32 new tokens, mean of 100 runs",
        machine="NVIDIA A40 48 GB",
        rows={("fanlora", 3): PaperRow(None, 16054)},
        settings={"fanlora": {"rank": 12}},
        speeds="illegible",
    ),
}


@dataclass(frozen=True)
class PaperCount:
    """Tunable parameters on LLaMA-2 7B: `printed` as the paper has it, `exact` (trainable), and
    `paper_counts`, what the paper's own way of counting gives where that is another number."""

    printed: str
    exact: int
    paper_counts: int | None = None
    note: str = ""


# On LLaMA-2 7B: 32 layers, hidden 4096, intermediate 11008.
PARAMETERS: dict[str, PaperCount] = {
    "lora": PaperCount("10.0M", 9_994_240),
    "fanlora": PaperCount("8.6M-8.8M", 8_613_888, note="6.3M to 11.6M by the attention/FFN split"),
    "ia3": PaperCount("9.8M", 9_831_936, note="without biases"),
    "ia3-original": PaperCount("0.6M", 614_400),
    "para": PaperCount("8.9M", 9_560_064, 8_945_664, note="the paper's figure omits b"),
}


@dataclass(frozen=True)
class PaperScores:
    """Test scores in percent of one table, (method, task) -> score; `backbones`: names of the published weights that
    it was measured on. Only tables of public backbones and tasks are here."""

    title: str
    backbones: tuple[str, ...]
    scores: Mapping[tuple[str, str], float]


# How many points PARA and FanLoRA are above LoRA in the papers' tables, over all tasks and backbones: least and most.
POINTS_OVER_LORA = (0.8, 1.6)
# Both papers predict with beam size 3.
SCORED_BEAMS = 3
SCORES: tuple[PaperScores, ...] = (
    PaperScores(
        title="PARA, Table 5: LLaMA-2 13B",
        backbones=("Llama-2-13b", "Llama-2-13b-hf"),
        scores={
            ("ia3", "boolq"): 89.6, ("ia3", "squad"): 90.6, ("lora", "boolq"): 90.0, ("lora", "squad"): 90.9,
            ("adalora", "boolq"): 90.2, ("adalora", "squad"): 91.6, ("para", "boolq"): 90.9, ("para", "squad"): 92.1,
        },
    ),
    PaperScores(
        title="PARA, Table 5: Gemma 2B",
        backbones=("gemma-2b",),
        scores={
            ("ia3", "boolq"): 82.7, ("ia3", "squad"): 78.1, ("lora", "boolq"): 82.8, ("lora", "squad"): 78.4,
            ("adalora", "boolq"): 83.0, ("adalora", "squad"): 78.8, ("para", "boolq"): 83.6, ("para", "squad"): 79.7,
        },
    ),
    PaperScores(
        title="FanLoRA, other backbones: LLaMA-2 7B",
        backbones=("Llama-2-7b", "Llama-2-7b-hf"),
        scores={("adalora", "boolq"): 84.9, ("fanlora", "boolq"): 86.4},
    ),
    PaperScores(
        title="FanLoRA, other backbones: Qwen1.5 7B",
        backbones=("Qwen1.5-7B",),
        scores={("adalora", "boolq"): 85.7, ("fanlora", "boolq"): 87.1},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class PaperStudy:
    """One ablation of a paper: `values`, what it prints for each of its rows, in the unit `unit`; only what is legible.
    `finding`: what it concludes, in a sentence."""

    title: str
    unit: str
    values: Mapping[str, tuple[float, ...]]
    finding: str


# All but fanlora_table7 were measured on LLM-Assist 7B, which is proprietary. The default setting's number, which a
# figure has too, is that of Table 1.
STUDIES: dict[str, PaperStudy] = {
    "fanlora_figure3": PaperStudy(
        title="FanLoRA, Figure 3(a) and Table 1: BoolQ, LLM-Assist 7B (proprietary)",
        unit="accuracy, %",
        values={"K_max 2": (87.9,)},
        finding="best with K_max 2; the other points of its curve are not printed",
    ),
    "fanlora_figure4": PaperStudy(
        title="FanLoRA, Figure 4(a) and Table 1: BoolQ, LLM-Assist 7B (proprietary)",
        unit="accuracy, %",
        values={"FanLoRA 12": (87.9,), "AdaLoRA 4": (87.0,)},
        finding="FanLoRA above AdaLoRA at every budget; the other points of its curves are not printed",
    ),
    "fanlora_table4": PaperStudy(
        title="FanLoRA, Table 4: LLM-Assist 7B (proprietary), three seeds",
        unit="Spearman",
        values={"AB-score": (0.989, 0.984, 0.991)},
        finding="the scores hardly depend on the seed",
    ),
    "fanlora_table6": PaperStudy(
        title="FanLoRA, Table 6: BoolQ, LLM-Assist 7B (proprietary)",
        unit="accuracy, %",
        values={"FanLoRA": (87.9,), "FanLoRA-1": (86.2,), "FanLoRA-2": (87.1,)},
        finding="Alpaca in the place of UltraChat (FanLoRA-1) and sensitivity in that of AB-score (FanLoRA-2) cost "
        "accuracy; Shapley values were not tried",
    ),
    "fanlora_table7": PaperStudy(
        title="FanLoRA, Table 7: BoolQ",
        unit="accuracy, %",
        values={
            f"{name}, {table.title.rpartition(': ')[2]}": (table.scores[method, "boolq"],)
            for table in SCORES
            if table.title.startswith("FanLoRA, other backbones")
            for name, method in (("AdaLoRA", "adalora"), ("FanLoRA", "fanlora"))
        },
        finding="FanLoRA above AdaLoRA on both backbones",
    ),
    "mmlu_zero_shot": PaperStudy(
        title="FanLoRA, Table 2, and PARA, Table 3: MMLU after UltraChat, LLM-Assist 7B (proprietary)",
        unit="accuracy, %",
        values={"AdaLoRA": (46.5,), "PARA": (47.4,), "FanLoRA": (47.9,)},
        finding="FanLoRA above PARA above AdaLoRA, on MT-Bench too (7.28, 7.21, 7.13)",
    ),
}


def paper_score(backbone: str, method: str, task: str, beams: int) -> tuple[float, str] | None:
    """(score in percent, the table's title) of the paper that ran just this; None where none did. The backbone is
    known by its name, the last part of its hub id or of the path of its folder."""
    name = backbone.rstrip("/").rpartition("/")[2].lower()
    for table in SCORES:
        if beams == SCORED_BEAMS and name in map(str.lower, table.backbones) and (method, task) in table.scores:
            return table.scores[method, task], table.title
    return None


def find_paper(name: str) -> Paper:
    """The paper's table called `name`. Raises ScenarioError with the nearest name on an unknown one."""
    if name not in PAPERS:
        raise ScenarioError(f"scenario.paper: unknown table {name!r}; {nearest(name, PAPERS)}")
    return PAPERS[name]
