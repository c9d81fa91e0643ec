"""What LoRA files say about each other before anything is rendered: pure functions over LoRAs."""
