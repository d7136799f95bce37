"""Stage 2: diffusion model of the planes of a latent set."""
