"""The embedded world: scenes of emoji, models trained on them, and what judges their pictures."""
