"""How a tuner becomes a method of PEFT: its settings, its model and its registration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import nn

from cmlora.errors import CmloraError


@dataclass
class TunerConfig(PeftConfig):  # type: ignore[misc]
    """Settings that all tuners have.

    Args:
        r: rank, or whatever number takes its place in a method.
        alpha: the update is multiplied by alpha / r; ``None`` is by 1.
        target_modules: names of layers or their endings, or one regular expression.
        exclude_modules: layers to leave out, in the same form.
        modules_to_save: layers that are trained and saved whole.
        bias: only "none"; PEFT asks for it.
        seed: of everything random. Frozen random tensors are drawn again from it after loading.
    """

    r: int = 8
    alpha: float | None = None
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    seed: int = 0
    method: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method:
            self.peft_type = peft_type(self.method)
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise CmloraError(f"{self.method}: r is {self.r!r}, not a whole number from 1")
        if self.bias != "none":
            raise CmloraError(f"{self.method}: bias is {self.bias!r}; only 'none' is supported")

    def strength(self) -> float:
        """What the update is multiplied by at weight 1."""
        return 1.0 if self.alpha is None else self.alpha / self.r


class TunerModel(BaseTuner):  # type: ignore[misc]
    """Puts layers of one kind into a model."""

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        config: TunerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config, current_key)
            return
        layer = self.tuner_layer_cls(target, adapter_name, config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


@dataclass(frozen=True)
class Tuner:
    """A method as PEFT has it.

    Args:
        config: class (or function) that makes the settings.
        model: the class that puts layers into a model.
        options: settings that make it this method, for classes that several methods share.
    """

    config: Any
    model: Any
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self, **options: Any) -> Any:
        """The settings of an adapter, for ``add_adapter`` or ``get_peft_model``."""
        return self.config(**self.options | options)


def plug(config: type[TunerConfig], layer: type[nn.Module]) -> Tuner:
    """Registers a method with PEFT, where its name begins with ``cm`` so that none is taken."""
    kind = peft_type(config.method)
    prefix = prefix_of(config.method)
    fields = {"prefix": prefix, "tuner_layer_cls": layer, "__module__": layer.__module__}
    model = type(layer.__name__.removesuffix("Layer") + "Model", (TunerModel,), fields)
    register_peft_method(name=kind.lower(), config_cls=config, model_cls=model, prefix=prefix)
    return Tuner(config, model)


def peft_type(method: str) -> Any:
    """PEFT's type of a method of ours; added to its enumeration the first time."""
    name = f"CM{method.upper()}"
    if name in PeftType.__members__:
        return PeftType[name]
    # There is no public way, and transformers needs a member with a value, not only a string.
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return member


def prefix_of(method: str) -> str:
    """What the names of a method's tensors begin with."""
    return f"cm{method}_"
