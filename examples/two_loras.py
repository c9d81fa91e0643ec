"""Two LoRAs in one picture: `python examples/two_loras.py [MODEL LORA LORA [STEPS]]`."""

import sys

from cmlora import CMLoRAPipeline


def main(
    model: str = "emoji",
    first: str = "character_1",
    second: str = "background_1",
    steps: str = "30",
) -> None:
    """Draw the same seed with every LoRA alone and with both, and say what each took."""
    pipe = CMLoRAPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    names = [pipe.load_lora_weights(first), pipe.load_lora_weights(second)]
    triggers = [pipe.loras[name].applied.triggers[0] for name in names]
    for chosen in ([names[0]], [names[1]], names):
        weights = dict.fromkeys(chosen, 1.0)
        output = pipe(
            ", ".join(triggers), num_inference_steps=int(steps), lora_weights=weights, seed=0
        )
        file = f"{'+'.join(chosen)}.png"
        output.images[0].save(file)
        full, light = sum(output.report.full.values()), sum(output.report.light.values())
        print(f"{file}: {full} full and {light} light passes, {output.report.seconds:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:5])
