"""Image to image, inpainting and ControlNets of transformers: other calls of the same denoisers."""

import pytest
import torch

from cmlora.compose import compose
from tests import dit_tasks
from tests.composing import average, state
from tests.families import NAMES
from tests.test_families import activate, assert_near, loop_over_loras

WEIGHTS = {"ink": 1.0, "alice": 0.6}


class Always:
    """Every step is a refresh step."""

    name, reuse = "always", True

    def refreshes(self, count: int) -> tuple[int, ...]:
        return tuple(range(count))


QUICK = {("sd3", "img2img"), ("flux", "controlnet"), ("qwen", "inpaint"), ("zimage", "controlnet")}
"""Each family and each task once; the others are slow tests."""


@pytest.mark.parametrize(
    ("family", "task"),
    [pytest.param(*t, marks=() if t in QUICK else pytest.mark.slow) for t in dit_tasks.TASKS],
)
def test_tasks_compute_what_a_plain_loop_computes(family: str, task: str) -> None:
    made = dit_tasks.task(family, task)
    activate(made, "ink")
    alone = made.run(steps=3)
    before = state(made.pipe)  # some pipelines leave an empty registry of hooks
    with compose(made.pipe, ["ink"], method=average):
        assert torch.equal(made.run(steps=3), alone)
    assert state(made.pipe) == before
    results = []
    for cache in ("none", Always(), "uniform:2"):
        with compose(made.pipe, WEIGHTS, method="composite", cache=cache) as composition:
            results.append(made.run(steps=3))
        # features of a steered pass hold what the ControlNet said at that step
        assert bool(composition.report.light) == (cache == "uniform:2" and task != "controlnet")
    assert state(made.pipe) == before
    if (family, task) != ("zimage", "controlnet"):
        assert_near(results[0], loop_over_loras(made, WEIGHTS, steps=3))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0]) == (task == "controlnet")
    assert not torch.allclose(results[0], alone, atol=1e-3)


def shared_controlnet() -> dit_tasks.Task:
    """Z-Image's ControlNet takes the transformer's refiner, with the LoRAs in it, for its own."""
    made = dit_tasks.task("zimage", "controlnet")
    assert made.pipe.controlnet.noise_refiner is made.pipe.transformer.noise_refiner
    return made


def test_a_controlnet_with_layers_of_the_denoiser_sees_all_loras() -> None:
    made = shared_controlnet()
    net, model = made.pipe.controlnet, made.models()[0]

    def together(*_: object) -> None:
        model.set_adapters(list(WEIGHTS), list(WEIGHTS.values()))

    handle = net.register_forward_pre_hook(together)
    try:
        expected = loop_over_loras(made, WEIGHTS, steps=2)
    finally:
        handle.remove()
    results = []
    for first in NAMES:  # what was active before has no part in it
        activate(made, first)
        before = state(made.pipe)
        with compose(made.pipe, WEIGHTS, method="composite"):
            results += [made.run(steps=2), made.run(steps=2)]
        assert state(made.pipe) == before
        assert not net._forward_pre_hooks
    assert_near(results[0], expected)
    assert all(torch.equal(result, results[0]) for result in results)
