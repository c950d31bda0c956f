"""Model families: everything specific to Stable Diffusion 3, SDXL or FLUX.2, behind one interface."""
