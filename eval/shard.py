"""Which part of the work this process does, when several do it together without talking."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from cmlora.errors import CmloraError

if TYPE_CHECKING:
    from cmlora.eval.jobs import Job

T = TypeVar("T")

_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")


@dataclass(frozen=True)
class Shard:
    """This process among all that share a study.

    Args:
        index: 0 to count - 1.
        count: how many there are.
        local: its number on this machine, which is also that of its accelerator.
    """

    index: int = 0
    count: int = 1
    local: int = 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `count`-th item: each belongs to exactly one shard.

        >>> Shard(1, 3).share("abcdefg")
        ['b', 'e']
        """
        return list(items[self.index :: self.count])

    def share_of_sets(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs of every `count`-th set, so that a set stays in one process."""
        sets = list(dict.fromkeys(job.ids for job in jobs))
        own = set(self.share(sets))
        return [job for job in jobs if job.ids in own]


def read_shard(text: str) -> Shard:
    """A shard as the command line gives it.

    Raises:
        CmloraError: if it is not like ``1/4``.

    >>> read_shard("1/4")
    Shard(index=1, count=4, local=0)
    """
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise CmloraError(f"--shard {text!r}: expected INDEX/COUNT, from 0/4 to 3/4 for example")
    return Shard(int(match[1]), int(match[2]))


def launched() -> Shard:
    """The shard that ``accelerate launch``, ``torchrun`` or ``mpirun`` made this process."""
    from accelerate.utils import get_int_from_env

    index, count = get_int_from_env(_RANK, 0), get_int_from_env(_COUNT, 1)
    return Shard(index, max(count, 1), get_int_from_env(_LOCAL, index))


def device_of(shard: Shard, wanted: str | None) -> str | None:
    """The accelerator of a process: its own one if the user names just the kind.

    Args:
        shard: this process.
        wanted: such as ``cuda`` or ``cuda:1``; ``None`` is an accelerator of its own if several
            processes were launched and there is one, else the CPU.
    """
    if wanted is None and shard.count > 1:
        import torch

        wanted = "cuda" if torch.cuda.device_count() > shard.local else None
    return f"{wanted}:{shard.local}" if wanted in ("cuda", "xpu") and shard.count > 1 else wanted
