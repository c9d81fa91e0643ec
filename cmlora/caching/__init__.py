"""What is kept between denoising steps, and when it is computed afresh."""
