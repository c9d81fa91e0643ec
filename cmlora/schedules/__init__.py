"""How strongly a LoRA acts when and where: curves over a run, by block, on any method."""
