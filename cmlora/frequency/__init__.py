"""Which LoRA draws high and which low spatial frequencies, measured."""
