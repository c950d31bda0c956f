"""Model families: what is particular to Stable Diffusion 3 and its like stays behind one door."""
