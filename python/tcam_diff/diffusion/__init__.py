"""Stage 2: diffusion over the planes of a latent set."""
