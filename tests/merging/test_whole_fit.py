"""Whole models with layers too wide for one fit, and with weights that are no numbers."""

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from cmlora.adapters.compression import COMPRESSIONS
from cmlora.adapters.compression.model import compress
from cmlora.adapters.merging.models import merge_models
from cmlora.errors import CmloraError
from tests import tiny


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def feeds(seed: int) -> FeedForward:
    torch.manual_seed(seed)
    return FeedForward(8, mult=3).eval()


@pytest.mark.parametrize("widest", [5, 9, 24, 25])
def test_wide_layers_are_fitted_part_by_part(widest: int) -> None:
    model, other, x = feeds(0), feeds(1), random(300, 8)
    wanted = (model(x) + other(x)).detach() / 2
    found = merge_models(model, other, [lambda m: m(x)], widest=widest)
    whole = merge_models(model, other, [lambda m: m(x)])
    mean = merge_models(model, other).model
    assert found.residuals.keys() == whole.residuals.keys() == {"net.0.proj", "net.2"}
    (before, after), best = found.residuals["net.2"], whole.residuals["net.2"]
    assert before == pytest.approx(best[0])
    assert best[1] * (1 - 1e-9) <= after < before
    # A part is fitted to what the others leave, which is most of what a whole fit finds.
    assert after - best[1] < 0.5 * (before - best[1])
    with torch.no_grad():
        errors = [float((m(x) - wanted).square().mean()) for m in (found.model, mean)]
    assert errors[0] < errors[1]
    if widest == 25:
        state = found.model.state_dict()
        assert all(torch.equal(t, state[k]) for k, t in whole.model.state_dict().items())


def test_convolutions_of_many_channels_are_fitted_too() -> None:
    one, other = tiny.unet_sd15(layers_per_block=1), tiny.unet_sd15(layers_per_block=1, seed=1)
    arguments = tiny.latents(), 10, random(1, 16, 16)
    found = merge_models(one, other, [lambda m: m(*arguments).sample], widest=60)
    widths = {n: p.flatten(1).shape[1] for n, p in one.named_parameters() if p.ndim > 1}
    wide = [n.removesuffix(".weight") for n, width in widths.items() if width > 60]
    assert "up_blocks.0.resnets.0.conv1" in wide
    assert found.residuals.keys() >= set(wide)
    assert all(after < before for before, after in (found.residuals[name] for name in wide))


def test_weights_that_are_no_numbers_are_named() -> None:
    model, broken = feeds(0), feeds(1)
    broken.get_parameter("net.2.weight").data[0, 0] = torch.nan
    with pytest.raises(CmloraError, match=r"the second model: net\.2\.weight holds NaN"):
        merge_models(model, broken)
    with pytest.raises(CmloraError, match=r"the first model: net\.2\.weight holds NaN"):
        merge_models(broken, model)


def test_nothing_is_compressed_that_is_no_number() -> None:
    method = COMPRESSIONS["svd"].object
    layer = nn.Linear(20, 20)
    gram = torch.eye(20)
    gram[0, 0] = torch.inf
    with pytest.raises(CmloraError, match=r"the moments of the inputs: 0 holds NaN"):
        compress(nn.Sequential(layer), method, 0.5, {"0": gram})
    layer.weight.data[3, 4] = torch.inf
    with pytest.raises(CmloraError, match=r"Sequential: 0\.weight holds NaN"):
        compress(nn.Sequential(layer), method, 0.5)
