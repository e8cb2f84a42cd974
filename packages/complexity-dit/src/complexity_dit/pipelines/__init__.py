"""Diffusers pipelines: sampling, image-to-image, inpainting, and the folders they are saved in."""
