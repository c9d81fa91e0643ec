"""Everything that determines a training, as one validated object; into and out of TOML."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cmlora import checks
from cmlora.errors import CmloraError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SECTIONS = ("options", "optim_options", "hook_options", "header")
FREE = frozenset(
    (
        "model",
        "data",
        "output",
        "prior_data",
        "save_every",
        "validate_every",
        "validation_prompts",
        "validation_steps",
        "tensorboard",
        "cache",
        "keep_checkpoint",
    )
)
"""Settings that a training may be resumed with other values of."""


@dataclass(frozen=True)
class Settings:
    """One training, see the fields' comments in `EXPLAINED`.

    Raises:
        CmloraError: for a value that is not possible, naming the field, the value and the range.
    """

    model: str = "emoji"
    data: str = ""
    output: str = "training"
    name: str = "lora"
    trigger: str = ""
    category: str = ""
    base: str = ""
    # The update.
    tuner: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    hook_options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ATTENTION
    text_targets: tuple[str, ...] = ()
    full: bool = False
    base_format: str = ""
    trp: bool = False
    trp_every: int = 20
    trp_energy: float = 0.98
    # The pictures.
    resolution: int = 512
    buckets: bool = True
    bucket_step: int = 64
    flip: bool = False
    caption_dropout: float = 0.0
    order: str = "epochs"
    prior_data: str = ""
    prior_prompt: str = ""
    prior_count: int = 0
    prior_weight: float = 1.0
    cache: str = "memory"
    # The loss.
    objective: str = "auto"
    min_snr: float = 0.0
    noise_offset: float = 0.0
    timesteps: str = "auto"
    guidance: float = 1.0
    # The steps.
    steps: int = 1000
    batch: int = 1
    accumulate: int = 1
    rate: float = 1e-4
    text_rate: float | None = None
    schedule: str = "constant"
    warmup: int = 0
    optim: str = "adamw"
    optim_options: Mapping[str, Any] = field(default_factory=dict)
    clip: float = 1.0
    ema: float = 0.0
    precision: str = "auto"
    checkpointing: bool = False
    seed: int = 0
    # What is written.
    save_every: int = 100
    keep_checkpoint: bool = False
    validate_every: int = 0
    validation_prompts: tuple[str, ...] = ()
    validation_steps: int = 30
    dtype: str = "float32"
    header: Mapping[str, Any] = field(default_factory=dict)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.validation_prompts, str):  # commas belong to a prompt
            object.__setattr__(self, "validation_prompts", (self.validation_prompts,))
        for name in ("targets", "text_targets", "validation_prompts"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        for name in SECTIONS:
            object.__setattr__(self, name, checks.table("train", name, getattr(self, name)))
        for name, bounds in _WHOLE.items():
            if getattr(self, name) is not None:
                checks.whole("train", name, getattr(self, name), *bounds)
        for name, (least, most) in _REAL.items():
            value = getattr(self, name)
            if value is None:
                continue
            number = checks.real("train", name, value)
            if not least <= number <= most:
                raise CmloraError(f"train: {name} is {number:g}, not between {least} and {most:g}")
            object.__setattr__(self, name, number)
        for name, allowed in _CHOICES.items():
            checks.choice("train", name, getattr(self, name), allowed)
        for one in fields(self):
            if one.type == "str":
                checks.text("train", one.name, getattr(self, one.name))
            if one.type == "bool" and not isinstance(getattr(self, one.name), bool):
                raise CmloraError(
                    f"train: {one.name} is {getattr(self, one.name)!r}, not true or false"
                )
        self._together()

    def _together(self) -> None:
        for key, text in self.header.items():
            checks.text("train", f"header.{key}", text)
        if not self.targets and not self.text_targets and not self.full:
            raise CmloraError("train: targets is empty, so nothing would be trained")
        if self.rate == 0 and not self.text_rate:
            raise CmloraError("train: rate is 0, so nothing would be learnt")
        if self.full and (self.base_format == "mxfp4" or self.text_targets):
            key = "text_targets" if self.text_targets else "base_format mxfp4"
            raise CmloraError(f"train: full trains the denoiser itself and does not go with {key}")
        if self.base_format == "quartet" and not self.full:
            raise CmloraError("train: base_format quartet trains the weights, so it needs full")
        if self.trp and not self.full:
            raise CmloraError("train: trp prunes the weights that are trained, so it needs full")
        if bool(self.prior_data) != bool(self.prior_prompt):
            missing = "prior_prompt" if self.prior_data else "prior_data"
            raise CmloraError(
                f"train: {missing} is missing; prior_data and prior_prompt go together"
            )
        if self.validate_every and not self.validation_prompts:
            raise CmloraError("train: validate_every needs validation_prompts to draw")
        if not self.name or "." in self.name or "/" in self.name or "\\" in self.name:
            raise CmloraError(f"train: name is {self.name!r}, not a file name without dots")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        table: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return table


def read(path: str | Path | None, changes: Mapping[str, Any] | None = None) -> Settings:
    """Settings from a TOML file, and what the command line changes in them.

    Args:
        path: the file; nothing means the defaults.
        changes: fields; those of ``options.key`` change one entry of a table.

    Raises:
        CmloraError: if the file cannot be read, is no TOML, or a key or value is not possible.
    """
    table: dict[str, Any] = {}
    where = "train" if path is None else str(path)
    if path is not None:
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CmloraError(f"cannot read {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise CmloraError(f"{path} is no TOML: {error}") from None
    for key, value in (changes or {}).items():
        section, dot, entry = key.partition(".")
        if dot and section in SECTIONS:
            table[section] = {**table.get(section, {}), entry: value}
        else:
            table[key] = value
    known = [one.name for one in fields(Settings)]
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=3)
            hint = (
                f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
            )
            raise CmloraError(f"{where}: unknown setting {key!r}{hint}")
    return Settings(**table)


def value(text: str) -> Any:
    """A value of the command line: TOML where it is TOML, otherwise a text.

    >>> value("0.5"), value("[1, 2]"), value("true"), value("to_q")
    (0.5, [1, 2], True, 'to_q')
    """
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _texts(name: str, found: object) -> tuple[str, ...]:
    if isinstance(found, str):
        found = [part.strip() for part in found.split(",") if part.strip()]
    if not isinstance(found, Sequence) or not all(isinstance(part, str) and part for part in found):
        raise CmloraError(f"train: {name} is {found!r}, not a list of texts")
    return tuple(found)


_WHOLE: dict[str, tuple[int, int]] = {
    "rank": (1, 2**20),
    "resolution": (8, 2**15),
    "bucket_step": (1, 2**12),
    "trp_every": (1, 10**9),
    "prior_count": (0, 2**20),
    "steps": (1, 10**9),
    "batch": (1, 2**16),
    "accumulate": (1, 2**16),
    "warmup": (0, 10**9),
    "seed": (0, 2**62),
    "save_every": (1, 10**9),
    "validate_every": (0, 10**9),
    "validation_steps": (1, 1000),
}
_REAL: dict[str, tuple[float, float]] = {
    "alpha": (1e-6, 1e6),
    "trp_energy": (1e-3, 1),
    "caption_dropout": (0, 1),
    "prior_weight": (0, 1000),
    "min_snr": (0, 1e6),
    "noise_offset": (0, 10),
    "guidance": (0, 100),
    "rate": (0, 100),
    "text_rate": (0, 100),
    "clip": (0, math.inf),
    "ema": (0, 0.999999999),
}
_CHOICES: dict[str, tuple[object, ...]] = {
    "base_format": ("", "mxfp4", "quartet"),
    "order": ("epochs", "random"),
    "cache": ("memory", "disk", "none"),
    "objective": ("auto", "epsilon", "v", "sample", "flow"),
    "timesteps": ("auto", "uniform", "logit_normal", "shifted"),
    "schedule": ("constant", "linear", "cosine"),
    "precision": ("auto", "no", "fp16", "bf16"),
    "dtype": ("float32", "float16", "bfloat16"),
}

EXPLAINED: dict[str, str] = {
    "model": "what is adapted: emoji, a diffusers folder, a .safetensors file or a hub id",
    "data": "folder of pictures with captions in .txt files or metadata.jsonl",
    "output": "folder for the adapter, the checkpoint, the log and the samples",
    "name": "of the adapter and its file",
    "trigger": "word that calls the concept: the caption where there is none, put before others",
    "category": "what it draws: character, style, ...; kept in the file",
    "base": "name of the base model, kept in the file",
    "tuner": "how the update is parametrised",
    "rank": "of the update; the tuner's own default if not given",
    "alpha": "the update is multiplied by alpha / rank; the tuner's own if not given, mostly 1",
    "options": "table of further settings of the tuner",
    "hook_options": "table of the tuner's own steps: samples of lora_sb, target of snella, ...",
    "targets": "layers of the denoiser, by the end of their names",
    "text_targets": "layers of the text encoders; they are not trained if empty",
    "full": "train the denoiser itself instead of an adapter",
    "base_format": "mxfp4 keeps the frozen base in 4 bits; quartet, with full, trains in 4 bits",
    "trp": "with full: pull the weights towards low rank (trained rank pruning)",
    "trp_every": "steps between two prunings",
    "trp_energy": "share of each weight's squared norm that a pruning keeps",
    "resolution": "pictures are brought to about this many pixels squared",
    "buckets": "keep the pictures' shapes, in buckets of equal area",
    "bucket_step": "sides are multiples of this",
    "flip": "also mirrored pictures",
    "caption_dropout": "share of captions replaced by an empty one",
    "order": "epochs, or random draws with replacement",
    "prior_data": "folder of pictures of the class, made with the model where missing",
    "prior_prompt": "caption of these",
    "prior_count": "how many there should be",
    "prior_weight": "of their loss",
    "cache": "latents and text embeddings: memory, disk (in the output folder), none",
    "objective": "epsilon, v, sample or flow; auto is the model's own",
    "min_snr": "gamma of the min-SNR weighting; 0 is none; 5 is usual",
    "noise_offset": "of every channel's mean; 0.05 is usual",
    "timesteps": "uniform, logit_normal, shifted as the pipeline does; auto: logit_normal for flow",
    "guidance": "given to models distilled for guidance",
    "steps": "of the optimizer",
    "batch": "pictures per process and backward pass",
    "accumulate": "backward passes per step",
    "rate": "learning rate",
    "text_rate": "that of the text encoders",
    "schedule": "constant, linear or cosine to zero",
    "warmup": "steps over which the rate rises",
    "optim": "optimizer",
    "optim_options": "table of its settings",
    "clip": "largest norm of the gradient; 0 is none",
    "ema": "decay of an average of the trained tensors, which is then what is saved; 0 is none",
    "precision": "no, fp16, bf16; auto is what accelerate launch says",
    "checkpointing": "compute activations twice instead of keeping them",
    "seed": "of everything random",
    "save_every": "steps between checkpoints",
    "keep_checkpoint": "keep it when the training is complete",
    "validate_every": "steps between sample pictures; 0 is never",
    "validation_prompts": "what they show",
    "validation_steps": "their denoising steps",
    "dtype": "of the tensors in the file",
    "header": "table of further texts in the file's header",
    "tensorboard": "also log for TensorBoard",
}
