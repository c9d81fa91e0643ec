"""Weight-space methods: tuners, merging, compression, training, analysis."""
