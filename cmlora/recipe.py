"""Everything that determines a picture, as one validated object, and how it travels in a PNG.

The recipe is stored twice: as JSON under the key ``cmlora``, from which it is read back, and as the
``parameters`` text that Stable Diffusion web UIs and image hosts understand. Reading looks at the
file's text chunks alone: no pixel is decoded, nothing is decompressed and nothing is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from importlib import metadata
from itertools import pairwise
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cmlora import checks, imagetext
from cmlora.atomic import replacing
from cmlora.errors import CmloraError
from cmlora.ingredient import Companion as Companion
from cmlora.ingredient import Ingredient as Ingredient

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

FORMAT = 1
"""Number of the JSON form; raised when an older program could misread it."""

_KEY = "cmlora"
_ADDED: Mapping[str, Any] = MappingProxyType(
    {"schedule": "", "uncond": "per_lora", "execution": "sequential", "threads": 0, "order": ()}
)
_ADDED_TO_LORA: Mapping[str, Any] = MappingProxyType(
    {
        "scope": None,
        "relevance": None,
        "importance": None,
        "into": (),
        "companions": (),
        "config": "",
    }
)
"""Fields younger than the format, with their defaults."""
_DTYPES = ("float32", "float16", "bfloat16")

SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "PNDMScheduler": "PLMS",
    "LMSDiscreteScheduler": "LMS",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2DiscreteScheduler": "DPM2",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "UniPCMultistepScheduler": "UniPC",
    "LCMScheduler": "LCM",
}
"""What web UIs call diffusers' schedulers."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines one picture.

    Args:
        model: where the base model is from.
        prompt: the prompt.
        seed: of the whole run, 0 to 2**64 - 1.
        steps: denoising steps asked for.
        width: of the picture in pixels.
        height: of the picture in pixels.
        index: which picture of the run this is; its own seed is `image_seed(seed, index)`.
        model_hash: identifies the base model's weights; empty if not known.
        loras: sorted by name, whatever the order they are given in.
        order: their names in the order of their turns; empty is by name.
        method: composition method.
        options: of the method, JSON values.
        cache: the cache policy as text.
        cut: (layer, block) of the UNet below which features are cached; ``None`` is the default.
        text_encoder: which LoRAs act on the text encoders: ``all``, ``none`` or ``per_lora``.
        schedule: curves that multiply the LoRAs' weights, see `cmlora.schedules.parse`; empty for
            none.
        uncond: whose unconditional predictions are used: ``per_lora`` or ``shared``.
        execution: of the passes of a step: ``sequential``, ``batched``, ``fused``, or ``auto``,
            with which the last bits of a picture depend on the memory that was free.
        threads: processor threads to compute with, on which the last bits depend too; 0 leaves
            them as they are.
        negative_prompt: the negative prompt.
        guidance_scale: of classifier-free guidance.
        scheduler: class name of the scheduler; empty is the model's own.
        scheduler_config: its configuration, JSON values.
        dtype: precision of the denoiser.
        versions: of the libraries, by name.

    Raises:
        CmloraError: if a value has the wrong type or is impossible; the message names the field.
    """

    model: str
    prompt: str
    seed: int
    steps: int
    width: int
    height: int
    index: int = 0
    model_hash: str = ""
    loras: tuple[Ingredient, ...] = ()
    order: tuple[str, ...] = ()
    method: str = "cmlora"
    options: Mapping[str, Any] = field(default_factory=dict)
    cache: str = "none"
    cut: tuple[int, int] | None = None
    text_encoder: str = "all"
    schedule: str = ""
    uncond: str = "per_lora"
    execution: str = "sequential"
    threads: int = 0
    negative_prompt: str = ""
    guidance_scale: float = 7.5
    scheduler: str = ""
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = "recipe"
        for name in ("model", "method", "cache"):
            checks.text(where, name, getattr(self, name), empty=False)
        for name in ("prompt", "negative_prompt", "model_hash", "scheduler", "schedule"):
            checks.text(where, name, getattr(self, name))
        checks.whole(where, "seed", self.seed, 0, 2**64 - 1)
        checks.whole(where, "index", self.index, 0, 2**63)
        for name in ("steps", "width", "height"):
            checks.whole(where, name, getattr(self, name), 1, 2**20)
        checks.choice(where, "text_encoder", self.text_encoder, ("all", "none", "per_lora"))
        checks.choice(where, "uncond", self.uncond, ("per_lora", "shared"))
        executions = ("sequential", "batched", "auto", "fused")
        checks.choice(where, "execution", self.execution, executions)
        checks.choice(where, "dtype", self.dtype, _DTYPES)
        checks.whole(where, "threads", self.threads, 0, 256)
        guidance = checks.real(where, "guidance_scale", self.guidance_scale)
        object.__setattr__(self, "guidance_scale", guidance)
        object.__setattr__(self, "loras", self._sorted_loras())
        object.__setattr__(self, "order", self._checked_order())
        object.__setattr__(self, "cut", self._checked_cut())
        for name in ("options", "scheduler_config", "versions"):
            object.__setattr__(self, name, checks.table(where, name, getattr(self, name)))
        for name, version in self.versions.items():
            checks.text(where, f"versions.{name}", version)

    def __hash__(self) -> int:
        return hash(self.digest())

    def to_json(self) -> str:
        """One line of JSON, ASCII, keys sorted: equal recipes give equal text.

        What was added after the first version is left out where it is at its default, so that
        recipes that do not use it stay the same and can be read by older versions.
        """
        table = {_KEY: FORMAT, **_without(asdict(self), _ADDED)}
        table["loras"] = [_without(lora, _ADDED_TO_LORA) for lora in table["loras"]]
        return json.dumps(table, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            CmloraError: if it is not a recipe, is from a newer version, or has unknown or wrong
                values.
        """
        try:
            table = json.loads(text)
        except (ValueError, RecursionError):
            raise CmloraError("this is not a recipe: it is not JSON") from None
        if not isinstance(table, dict) or _KEY not in table:
            raise CmloraError(f"this is not a recipe: it has no key {_KEY!r}")
        version = table.pop(_KEY)
        checks.whole("recipe", _KEY, version, 1, 2**31)
        if version > FORMAT:
            raise CmloraError(
                f"this recipe has format {version} and this program reads up to {FORMAT}; "
                "upgrade cmlora"
            )
        arguments = _known(cls, table)
        loras = arguments.get("loras", [])
        if not isinstance(loras, list) or not all(isinstance(lora, dict) for lora in loras):
            raise CmloraError("recipe: loras is not a list of tables")
        arguments["loras"] = tuple(Ingredient(**_known(Ingredient, lora)) for lora in loras)
        return cls(**arguments)

    def digest(self) -> str:
        """SHA-256 of the JSON, 64 hex digits: the identity of a job, the same on every machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def image_seed(self) -> int:
        """The seed of this picture's own noise generator."""
        return image_seed(self.seed, self.index)

    def turns(self) -> tuple[Ingredient, ...]:
        """The LoRAs in the order of their turns, for methods to which it matters."""
        named = {lora.name: lora for lora in self.loras}
        return tuple(named[name] for name in self.order) or self.loras

    def _sorted_loras(self) -> tuple[Ingredient, ...]:
        if not isinstance(self.loras, (tuple, list)):
            raise CmloraError(f"recipe: loras is {self.loras!r}, not a sequence of Ingredient")
        for lora in self.loras:
            if not isinstance(lora, Ingredient):
                raise CmloraError(f"recipe: loras contains {lora!r}, not an Ingredient")
        ordered = tuple(sorted(self.loras, key=lambda lora: lora.name))
        for one, other in pairwise(ordered):
            if one.name == other.name:
                raise CmloraError(f"recipe: two LoRAs are called {one.name!r}")
        return ordered

    def _checked_order(self) -> tuple[str, ...]:
        names = [lora.name for lora in self.loras]
        order = tuple(self.order) if isinstance(self.order, (tuple, list)) else (self.order,)
        if order and (not all(isinstance(n, str) for n in order) or sorted(order) != names):
            listed = ", ".join(names) or "none"
            raise CmloraError(f"recipe: order is {self.order!r:.200}; its LoRAs are {listed}")
        return order

    def _checked_cut(self) -> tuple[int, int] | None:
        if self.cut is None:
            return None
        if not isinstance(self.cut, (tuple, list)) or len(self.cut) != 2:
            raise CmloraError(f"recipe: cut is {self.cut!r}, not (layer, block)")
        for number, least in zip(self.cut, (0, -1), strict=True):
            checks.whole("recipe", "cut", number, least, 1000)
        return (self.cut[0], self.cut[1])


def image_seed(seed: int, index: int) -> int:
    """The seed of one picture of a run, from nothing but the run's seed and the picture's number.

    Picture 0 has the seed itself, so that a single picture is what any diffusers pipeline makes of
    that seed. The others have the first 48 bits of SHA-256 of ``"seed:index"``: no picture depends
    on the batch size, on the order, or on which others are made, and neighbouring seeds share none
    (``seed + index`` would).

    >>> image_seed(7, 0)
    7
    >>> image_seed(7, 1) != image_seed(8, 0)
    True
    """
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:6], "big")


def current_versions() -> dict[str, str]:
    """Versions of the installed libraries that influence a picture."""
    found = {}
    for name in ("cmlora", "diffusers", "peft", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def infotext(recipe: Recipe) -> str:
    """The recipe as Stable Diffusion web UIs write it below a picture.

    LoRAs are ``<lora:file:weight>`` at the end of the prompt, with AutoV2 hashes, by which image
    hosts find them. It says less than the JSON and is never read back.
    """
    files = [
        (_plain(Path(file).stem or lora.name), weight, digest)
        for lora in recipe.loras
        for file, weight, digest in (
            (lora.file, lora.weight, lora.sha256),
            *((c.file, lora.weight * c.weight, c.sha256) for c in lora.companions),
        )
    ]
    tags = " ".join(f"<lora:{name}:{weight:g}>" for name, weight, _ in files)
    lines = [f"{recipe.prompt} {tags}".strip()]
    if recipe.negative_prompt:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    scheduler = recipe.scheduler
    values = {
        "Steps": str(recipe.steps),
        "Sampler": SAMPLERS.get(scheduler, scheduler.removesuffix("Scheduler")),
        "Schedule type": "Karras" if recipe.scheduler_config.get("use_karras_sigmas") else "",
        "CFG scale": f"{recipe.guidance_scale:g}",
        "Seed": str(recipe.image_seed()),
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.model_hash[:10],
        "Model": _plain(Path(recipe.model).name),
        "Lora hashes": ", ".join(f"{name}: {digest[:10]}" for name, _, digest in files if digest),
        "LoRA method": recipe.method if recipe.loras else "",
        "LoRA cache": recipe.cache if recipe.cache != "none" else "",
        "Version": f"cmlora {recipe.versions['cmlora']}" if "cmlora" in recipe.versions else "",
    }
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in values.items() if value))
    return "\n".join(lines).replace("\0", "")


def png_info(recipe: Recipe) -> PngInfo:
    """The text chunks of a picture's PNG, for ``image.save(..., pnginfo=...)``."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(_KEY, recipe.to_json())
    info.add_text("parameters", infotext(recipe))
    return info


def save_png(image: Image, path: str | PathLike[str], recipe: Recipe) -> None:
    """Writes a picture with its recipe; the file appears whole or not at all.

    Raises:
        CmloraError: if the name does not end in ``.png`` or the place cannot be written to.
    """
    if Path(path).suffix.lower() != ".png":
        raise CmloraError(f"{path} should end in .png; other formats do not keep the recipe")
    with replacing(path) as file:
        image.save(file, format="PNG", pnginfo=png_info(recipe))


def from_png(path: str | PathLike[str]) -> Recipe:
    """The recipe in a picture; time and memory are bounded whatever the file is.

    WebP and JPEG are read as well, see `cmlora.pictures`.

    Raises:
        CmloraError: if there is no such file, it is no picture, or it holds no valid recipe.
    """
    found = imagetext.texts(path)
    if _KEY not in found:
        hint = "; it has another program's text" if found.get("parameters") else ""
        raise CmloraError(f"{path} holds no recipe; only pictures made by cmlora do{hint}")
    try:
        return Recipe.from_json(found[_KEY])
    except CmloraError as error:
        raise CmloraError(f"{path}: {error}") from None


def _without(table: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a table that are not at their defaults."""
    return {k: v for k, v in table.items() if k not in defaults or v != defaults[k]}


def _plain(name: str) -> str:
    """A name without the characters that separate names in the infotext."""
    return "".join("_" if c in ',:<>"\n' else c for c in name)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\n') else value


def _known(kind: type, table: Mapping[str, Any]) -> dict[str, Any]:
    """The table if it has all and only the fields of a class."""
    names = {f.name for f in fields(kind)}
    for key in table:
        if key not in names:
            near = get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise CmloraError(f"recipe: unknown key {key!r}{hint}")
    required = (
        ("model", "prompt", "seed", "steps", "width", "height") if kind is Recipe else ("name",)
    )
    for key in required:
        if key not in table:
            raise CmloraError(f"recipe: {key} is missing")
    return dict(table)
