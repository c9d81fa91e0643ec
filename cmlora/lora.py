"""LoRA: a named set of low-rank updates, and the algebra that never leaves the factors.

An update of one module is ``delta = scale * up @ down``. PEFT calls the factors ``lora_A`` (down)
and ``lora_B`` (up), kohya ``lora_down`` and ``lora_up``; both derive the scale as alpha / rank.

Shape letters: R rank, I and O in and out features (channels), kh and kw the sides of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DENOISERS = ("unet", "transformer", "transformer_2")


@dataclass(frozen=True, eq=False)
class Update:
    """The low-rank update of one linear or convolution layer.

    Args:
        down: (R, I) for a linear layer, (R, I, kh, kw) for a convolution.
        up: (O, R).
        scale: multiplies the product; alpha / rank in files.
        mid: core of a Tucker-decomposed convolution, (R, M, kh, kw); ``down`` is then (M, I, 1, 1).

    Raises:
        ValueError: if the shapes do not fit each other.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    def __post_init__(self) -> None:
        down, up, mid = tuple(self.down.shape), tuple(self.up.shape), self.mid
        if len(down) not in (2, 4) or len(up) != 2:
            raise ValueError(f"down {down}, up {up} are not (rank, in[, kh, kw]), (out, rank)")
        inner = down[0]
        if mid is not None:
            shape = tuple(mid.shape)
            if len(shape) != 4 or shape[1] != inner or down[2:] != (1, 1):
                raise ValueError(f"mid {shape} does not fit down {down}")
            inner = shape[0]
        if up[1] != inner:
            raise ValueError(f"down {down} and up {up} have different ranks")

    @property
    def rank(self) -> int:
        """R: an upper bound of the rank of the delta."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta: (O, I) or (O, I, kh, kw)."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def folded(self) -> Update:
        """The same update as two factors: ``mid`` is multiplied into ``down``."""
        if self.mid is None:
            return self
        down = torch.einsum("rmhw,mi->rihw", full(self.mid), full(self.down).flatten(1))
        # Eight bits are enough for what was trained in them, and not for a product of it.
        small = self.down.dtype.itemsize == 1
        return replace(self, down=down if small else down.to(self.down.dtype), mid=None)

    def delta(self) -> Tensor:
        """The dense update, in float32 (float64 if the factors are), shaped like the matrix."""
        both = self.folded()
        product = full(both.up) @ full(both.down).flatten(1)
        return (product * both.scale).reshape(self.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(O, R) and (R, I * kh * kw) in float64 whose product is the flattened delta."""
        both = self.folded()
        return both.up.double() * both.scale, both.down.double().flatten(1)

    def inner(self, other: Update) -> float:
        """Frobenius inner product of two deltas, from R x R products alone.

        Raises:
            ValueError: if the deltas have different shapes.
        """
        (up, down), (other_up, other_down) = self.factors(), other.factors()
        if up.shape[0] != other_up.shape[0] or down.shape[1] != other_down.shape[1]:
            raise ValueError(f"no inner product of shapes {self.shape} and {other.shape}")
        return float(((up.T @ other_up) * (down @ other_down.T)).sum())

    def norm(self) -> float:
        """Frobenius norm of the delta, from the triangular factors of both sides."""
        return float(torch.linalg.matrix_norm(_core(self)[1]))

    def singular_values(self) -> Tensor:
        """The at most R non-zero singular values of the flattened delta, descending, float64."""
        values: Tensor = torch.linalg.svdvals(_core(self)[1])
        return values

    def truncate(self, rank: int | None = None, tolerance: float = 0.0) -> Update:
        """The nearest update of lower rank (Eckart-Young): QR of the factors, SVD of their core.

        Args:
            rank: the largest rank kept; ``None`` is as many as the tolerance asks for.
            tolerance: the share of the norm that may be lost; singular values are dropped
                from the smallest while the error stays at or below ``tolerance * norm``.

        Returns:
            An update of rank 1 or more with scale 1, in the factors' own precision but at least
            float32.
        """
        left, core, right = _core(self)
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        energy = s.square()
        lost = energy.flip(0).cumsum(0).flip(0)  # [k]: lost by dropping k and all after
        budget = tolerance**2 * float(energy.sum())
        keep = int((lost > budget).sum())
        keep = max(1, min(keep, len(s), len(s) if rank is None else rank))
        root = s[:keep].sqrt()
        dtype = at_least_single(self.up.dtype)
        up = (left @ (u[:, :keep] * root)).to(dtype)
        down = ((root[:, None] * vh[:keep]) @ right.T).to(dtype)
        return Update(down.reshape(keep, *self.shape[1:]), up)


@dataclass(frozen=True, eq=False)
class LoRA:
    """A named set of updates.

    Args:
        name: what it is called; decides the order wherever LoRAs are summed.
        updates: by module name as diffusers has it, with the pipeline's component in front:
            ``unet.mid_block.attentions.0.proj_in``. CLIP's modules always carry ``text_model.``
            (``text_encoder.text_model.encoder.layers.0.mlp.fc1``), which new transformers drop.
        metadata: strings of the file's header that are not expressed by the other fields.
        triggers: the words that call it, most important first.
    """

    name: str
    updates: Mapping[str, Update]
    metadata: Mapping[str, str] = field(default_factory=dict)
    triggers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "updates", dict(sorted(self.updates.items())))
        object.__setattr__(self, "metadata", dict(sorted(self.metadata.items())))
        object.__setattr__(self, "triggers", tuple(self.triggers))

    @property
    def category(self) -> str | None:
        """What it draws ("character", "style", ...), if its file says so."""
        return self.metadata.get("cmlora.category")

    @property
    def parts(self) -> dict[str, dict[str, Update]]:
        """Updates by component, then by module name within the component."""
        found: dict[str, dict[str, Update]] = {}
        for module, update in self.updates.items():
            component, _, name = module.partition(".")
            found.setdefault(component, {})[name] = update
        return found

    def deltas(self) -> dict[str, Tensor]:
        """Dense updates by module."""
        return {module: update.delta() for module, update in self.updates.items()}

    def inner(self, other: LoRA) -> float:
        """Frobenius inner product over all modules; a module missing on one side counts as zero."""
        shared = self.updates.keys() & other.updates.keys()
        return math.fsum(self.updates[m].inner(other.updates[m]) for m in sorted(shared))

    def norm(self) -> float:
        """Frobenius norm over all modules."""
        return math.sqrt(math.fsum(update.norm() ** 2 for update in self.updates.values()))

    def cosine(self, other: LoRA) -> float:
        """Alignment of two LoRAs, -1 to 1; 0 if either changes nothing."""
        norms = self.norm() * other.norm()
        return self.inner(other) / norms if norms else 0.0

    def truncate(self, rank: int | None = None, tolerance: float = 0.0) -> LoRA:
        """Every module truncated, see `Update.truncate`."""
        cut = {m: update.truncate(rank, tolerance) for m, update in self.updates.items()}
        return replace(self, updates=cut)


def stack(loras: Sequence[tuple[LoRA, float]], name: str) -> LoRA:
    """The weighted sum of LoRAs as one LoRA whose ranks are the sums of the ranks.

    Nothing is approximated: factors are put side by side, a weight goes into the scale of a module
    that only one LoRA touches and into ``up`` otherwise. The order of the arguments is irrelevant.

    Args:
        loras: (LoRA, weight) pairs.
        name: name of the result.

    Returns:
        A LoRA with the triggers of all and no metadata.

    Raises:
        ValueError: if one module has different shapes in two LoRAs.
    """
    ordered = sorted(loras, key=lambda pair: (pair[0].name, pair[1]))
    modules: dict[str, list[Update]] = {}
    for lora, weight in ordered:
        for module, update in lora.updates.items():
            scaled = replace(update, scale=update.scale * weight)
            modules.setdefault(module, []).append(scaled)
    triggers = dict.fromkeys(trigger for lora, _ in ordered for trigger in lora.triggers)
    updates = {module: _concatenate(module, found) for module, found in modules.items()}
    return LoRA(name, updates, triggers=tuple(triggers))


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The precision to compute in with numbers of a type: theirs, or single if that is higher.

    >>> at_least_single(torch.float8_e4m3fn), at_least_single(torch.float64)
    (torch.float32, torch.float64)
    """
    # PyTorch promotes no floating point numbers of eight bits.
    return torch.float32 if dtype.itemsize == 1 else torch.promote_types(dtype, torch.float32)


def full(tensor: Tensor) -> Tensor:
    """The tensor in at least single precision, where half precision would round a product."""
    return tensor.to(at_least_single(tensor.dtype))


def dense(delta: Tensor) -> Update:
    """A whole matrix as an update: one factor is the identity, on the side where it is smaller.

    Args:
        delta: (O, I) or (O, I, kh, kw).
    """
    matrix = delta.flatten(1)
    outputs, inputs = matrix.shape
    if delta.ndim == 2 and inputs < outputs:
        return Update(torch.eye(inputs, dtype=delta.dtype), matrix)
    return Update(delta, torch.eye(outputs, dtype=delta.dtype))


def _concatenate(module: str, updates: Sequence[Update]) -> Update:
    if len(updates) == 1:
        return updates[0]
    kernels = {update.shape[2:] or (1, 1) for update in updates}
    sizes = {update.shape[:2] for update in updates}
    if len(kernels) > 1 or len(sizes) > 1:
        shapes = " and ".join(str(s) for s in sorted({u.shape for u in updates}))
        raise ValueError(f"{module} has different shapes in the LoRAs: {shapes}")
    folded = [update.folded() for update in updates]
    # A 1x1 convolution is stored as a matrix by some trainers and as a kernel by others.
    kernel = max((update.shape[2:] for update in updates), key=len)
    downs = [full(u.down).reshape(*u.down.shape[:2], *kernel) for u in folded]
    ups = [full(u.up) * u.scale for u in folded]
    return Update(torch.cat(downs, 0), torch.cat(ups, 1))


def _core(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal (O, r), core (r, q), orthonormal (I * kh * kw, q): delta = left core right^T."""
    up, down = update.factors()
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    return left, left_core @ right_core.T, right
