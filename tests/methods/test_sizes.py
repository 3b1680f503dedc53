"""Stand-ins for tensors: as large as torch's, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perfbench.methods.sizes import Sized


@pytest.mark.parametrize(
    "work",
    [
        lambda make: make(3, 4).t() * 2.5,
        lambda make: make(16) @ make(16, 5),
        lambda make: make(2, 3) @ make(3, 5),
        lambda make: (make(7) - 1) + make(7),
        lambda make: 1 - make(7) / 2,
        lambda make: make(12).reshape(-1, 2, 3).repeat(1, 1, 2)[:, -1].cos() * make(6).sin(),
        lambda make: make(3, 8)[:, :5].flatten(),
        lambda make: make(4, 6)[1:3],
        lambda make: make(4)[0],
    ],
)
def test_a_result_has_torch_s_size(work: Any) -> None:
    sized, real = work(Sized), work(torch.zeros)
    assert sized.shape == tuple(real.shape)
    assert sized.numel() == real.numel()


@pytest.mark.parametrize(
    "work",
    [
        lambda: Sized(3).t(),
        lambda: Sized(3) @ Sized(4, 2),
        lambda: Sized(3) @ 2,
        lambda: Sized(3) + Sized(1, 3),
        lambda: Sized(3)[None],
        lambda: Sized(3)[0, 0],
        lambda: Sized(5).reshape(-1, 2),
        lambda: Sized(5).repeat(2, 2),
        lambda: Sized(3).exp(),  # type: ignore[attr-defined]
    ],
)
def test_what_it_can_t_is_refused(work: Any) -> None:
    with pytest.raises((TypeError, AttributeError)):
        work()
