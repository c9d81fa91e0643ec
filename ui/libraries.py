"""The heavy libraries, loaded by one thread while the others wait."""

import threading

_LOADING = threading.Lock()


def ready() -> None:
    """Load diffusers and what the page uses of it, if that is not done yet.

    Its modules load each other at first use, and two threads that do so at once find half of a
    module; so whatever may be the first to use it, beside the thread that loads the first model,
    asks here before.
    """
    with _LOADING:
        from diffusers import (  # noqa: F401
            AutoencoderKL,
            DiffusionPipeline,
            StableDiffusionPipeline,
            UNet2DConditionModel,
        )

        import cmlora.cost
        import cmlora.pipelines.learning
        import cmlora.pipelines.render  # noqa: F401
