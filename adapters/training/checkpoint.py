"""What a training is resumed from, and whether it is the same training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmlora.adapters.training import state
from cmlora.adapters.training.parts import copied, write_back
from cmlora.adapters.training.settings import FREE
from cmlora.errors import CmloraError

if TYPE_CHECKING:
    from cmlora.adapters.training.trainer import Trainer


def save(trainer: Trainer, path: Path) -> None:
    """Writes all that a training has become; the file before stays until the new one is whole."""
    state.save(
        path,
        {
            "settings": trainer.settings.to_dict(),
            "pictures": trainer.digests,
            "step": trainer.step,
            "tensors": copied(trainer.parts.tensors()),
            "optimizer": trainer.optimizer.state_dict(),
            "average": trainer.average.values,
            "count": trainer.average.count,
            "scaled": trainer.scaled.state(),
            "hooks": [hook.state() for hook in trainer.hooks],
        },
    )


def restore(trainer: Trainer, path: Path) -> None:
    """Takes up what `save` wrote.

    Raises:
        CmloraError: if it is damaged, or of other settings, pictures or models.
    """
    found, where = state.load(path), str(path)
    _check_same(trainer, found, where)
    write_back(trainer.parts.tensors(), found["tensors"], where)
    trainer.optimizer.load_state_dict(found["optimizer"])
    if trainer.average.decay:
        write_back(trainer.average.values, found["average"], where)
    trainer.average.count, trainer.step = found["count"], found["step"]
    trainer.scaled.restore(found["scaled"])
    for hook, kept in zip(trainer.hooks, found["hooks"], strict=True):
        hook.restore(kept)


def _check_same(trainer: Trainer, found: dict[str, Any], where: str) -> None:
    before, now = found["settings"], trainer.settings.to_dict()
    for key, value in now.items():
        if key not in FREE and before.get(key) != value:
            raise CmloraError(
                f"{where}: {key} was {before.get(key)!r} and is {value!r} now; resume with the "
                "same settings, or choose another output folder"
            )
    if found["pictures"] != trainer.digests:
        raise CmloraError(
            f"{where} is of other pictures or captions; put them back, or choose another output "
            "folder"
        )
