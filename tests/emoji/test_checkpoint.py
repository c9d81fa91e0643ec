"""A training continues after an interruption as if there had been none."""

from pathlib import Path

import torch
from torch import Tensor, nn

from cmlora.emoji.checkpoint import Averaged, Checkpoint


class _Training:
    """A regression with a batch per step, as the real trainings have."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.average = Averaged(self.model, 0.9)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.checkpoint = Checkpoint(path, self.model, self.average, self.optimizer)

    def run(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            loss = (self.model(x) - x[:, :3]).square().mean()
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            self.average.update()

    def values(self) -> list[Tensor]:
        return [*(p.detach().clone() for p in self.model.parameters()), *self.average.values]


def test_resuming_changes_no_bit(tmp_path: Path) -> None:
    whole = _Training(tmp_path / "whole.pt")
    whole.run(0, 20)
    first = _Training(tmp_path / "run.pt")
    assert first.checkpoint.resume() == 0
    first.run(0, 12)
    first.checkpoint.save(12)
    second = _Training(tmp_path / "run.pt")
    start = second.checkpoint.resume()
    assert start == 12
    second.run(start, 20)
    assert all(map(torch.equal, second.values(), whole.values()))
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_average_is_that_of_a_plain_loop_and_is_taken_off_again() -> None:
    model = nn.Linear(2, 1)
    average = Averaged(model, 0.5)
    expected = model.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.weight += step
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    before = model.weight.detach().clone()
    with average.applied():
        assert torch.allclose(model.weight, expected)
    assert torch.equal(model.weight, before)
