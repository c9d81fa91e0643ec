"""The step is found from what a denoiser is called with, for every way pipelines call one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.hooks.hooks import CacheContext
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.tracker import StepTracker

SCHEDULERS = {
    "ddim": DDIMScheduler(),
    "heun": HeunDiscreteScheduler(),
    "pndm": PNDMScheduler(skip_prk_steps=True),
}


def pipe(name: str, steps: int) -> Any:
    """What a tracker needs of a pipeline that is about to run."""
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(steps)
    return SimpleNamespace(scheduler=scheduler)


def as_view(timestep: torch.Tensor) -> Any:
    return timestep


def as_batch(timestep: torch.Tensor) -> Any:
    return timestep.expand(3)


def as_copy(timestep: torch.Tensor) -> Any:
    return timestep.clone()


def as_number(timestep: torch.Tensor) -> Any:
    return timestep.item()


FORMS = [as_view, as_batch, as_copy, as_number]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULERS)),
    form=st.sampled_from(FORMS),
    runs=st.lists(st.tuples(st.integers(2, 9), st.integers(0, 9)), min_size=1, max_size=4),
)
def test_runs_are_counted_even_after_interruptions(
    name: str, form: Any, runs: list[tuple[int, int]]
) -> None:
    """Each run has a number of steps, and is interrupted after some of them."""
    here = pipe(name, 2)
    tracker = StepTracker(here)
    for steps, interrupted in runs:
        here.scheduler.set_timesteps(steps)
        timesteps = here.scheduler.timesteps
        for index, timestep in enumerate(timesteps[: interrupted + 1]):
            tick = tracker.tick(form(timestep))
            assert (tick.index, tick.count) == (index, len(timesteps))
            assert tick.timestep == float(timestep)
            assert tick.fresh == (index == 0)
            assert not tick.repeated
            assert tick.branch == ""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("named", [True, False])
def test_several_calls_per_step(form: Any, named: bool) -> None:
    here = pipe("ddim", 4)
    tracker = StepTracker(here)
    for index, timestep in enumerate(here.scheduler.timesteps):
        branches = []
        for branch in ("cond", "uncond"):
            tick = tracker.tick(form(timestep), CacheContext(branch) if named else None)
            assert (tick.index, tick.count) == (index, 4)
            assert tick.repeated == (branch == "uncond")
            branches.append(tick.branch)
        assert branches == (["cond", "uncond"] if named else ["", "#1"])


def test_named_calls_with_repeated_timesteps() -> None:
    here = pipe("heun", 4)
    tracker = StepTracker(here)
    found = [
        tracker.tick(float(timestep), CacheContext(branch)).index
        for timestep in here.scheduler.timesteps
        for branch in ("cond", "uncond")
    ]
    assert found == [i for i in range(7) for _ in range(2)]


def test_the_same_table_twice_is_two_runs() -> None:
    here = pipe("ddim", 4)
    tracker = StepTracker(here)
    for _ in range(2):
        ticks = [tracker.tick(timestep) for timestep in here.scheduler.timesteps]
        assert [tick.fresh for tick in ticks] == [True, False, False, False]


def test_a_part_of_the_table() -> None:
    here = pipe("ddim", 10)
    tracker = StepTracker(here)
    ticks = [tracker.tick(timestep) for timestep in here.scheduler.timesteps[4:]]
    assert [(tick.index, tick.count) for tick in ticks] == [(i, 6) for i in range(6)]
    here.scheduler.set_timesteps(10)
    here.num_timesteps = 3
    ticks = [tracker.tick(timestep) for timestep in here.scheduler.timesteps[:3]]
    assert [(tick.index, tick.count) for tick in ticks] == [(i, 3) for i in range(3)]


def test_a_stale_length_is_dropped_when_it_is_passed() -> None:
    here = pipe("ddim", 6)
    here.num_timesteps = 2
    tracker = StepTracker(here)
    ticks = [tracker.tick(timestep) for timestep in here.scheduler.timesteps]
    assert [tick.index for tick in ticks] == list(range(6))
    assert [tick.count for tick in ticks] == [2, 2, 6, 6, 6, 6]


def test_scaled_timesteps_follow_the_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    tracker = StepTracker(SimpleNamespace(scheduler=scheduler))
    for steps in (4, 3):
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)  # as pipelines do
        sample = torch.zeros(1, 4)
        found = []
        for timestep in scheduler.timesteps:
            for branch in ("cond", "uncond"):
                found.append(tracker.tick(timestep / 1000, CacheContext(branch)).index)
            sample = scheduler.step(torch.zeros(1, 4), timestep, sample).prev_sample
        assert found == [i for i in range(steps) for _ in range(2)]


def test_a_context_that_knows_the_step_is_believed() -> None:
    here = pipe("ddim", 8)
    tracker = StepTracker(here)
    ticks = [
        tracker.tick(torch.tensor(0.5), CacheContext("cond", step_index=i, num_inference_steps=5))
        for i in range(5)
    ]
    assert [(tick.index, tick.count) for tick in ticks] == [(i, 5) for i in range(5)]
    assert [tick.fresh for tick in ticks] == [True, False, False, False, False]


@pytest.mark.parametrize("here", [SimpleNamespace(), SimpleNamespace(scheduler=DDIMScheduler())])
def test_an_unknown_timestep_is_a_run_of_one_step(here: Any) -> None:
    tracker = StepTracker(here)
    for _ in range(2):
        tick = tracker.tick(0.25)
        assert (tick.index, tick.count, tick.timestep, tick.fresh) == (0, 1, 0.25, True)


def test_reset_begins_a_new_run() -> None:
    here = pipe("ddim", 4)
    tracker = StepTracker(here)
    tracker.tick(here.scheduler.timesteps[0])
    tracker.reset()
    assert tracker.tick(here.scheduler.timesteps[0]).fresh
