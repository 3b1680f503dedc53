"""The settings that a launch takes: asked for once, since every launch of every step wants them."""

from __future__ import annotations

import pytest
import torch

from perfbench.kernels import settings


def test_the_gpu_is_asked_for_its_name_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def name(device: object) -> str:
        asked.append(device)
        return "a GPU that the table lacks"

    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    settings.gpu_name.cache_clear()
    try:
        for _ in range(3):
            assert settings.setting("row_scale", torch.device("cuda", 0)) == settings.DEFAULTS["row_scale"]
    finally:
        settings.gpu_name.cache_clear()
    assert asked == [0]
