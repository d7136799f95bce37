"""Rivals of TCAM-Diff, of MONAI's networks: VAE-GAN and VQ-GAN, each with 3D latent diffusion, and a Gaussian of our planes.

The other two rivals of the paper are settings of our own stage 2: ``network.weights=concatenated`` (planes as channels of one
image, as in NFD) and ``network.cross=none`` (three streams without cross-attention).
"""
