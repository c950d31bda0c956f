"""Compare the standard deviation of generators' latents with the teacher's: how far they left its manifold.

.venv/bin/python benchmarks/latent_spread.py CHECKPOINT ... [--count N]
"""

import argparse

import torch

from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.data.evaluation_prompts import read_evaluation_prompts
from gdmd_lightning.samplers import rollout
from gdmd_lightning.streams import draw_noise, stream, streams_of


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="of Shapes; the first gives the teacher")
    parser.add_argument("--count", type=int, default=600, help="number of test prompts")
    parser.add_argument("--steps", type=int, default=30, help="steps of the teacher")
    options = parser.parse_args()
    texts = [prompt.text for prompt in read_evaluation_prompts("shapes", options.count)]
    for number, path in enumerate(options.checkpoints):
        module = load_module(path, role="ema")
        noise = draw_noise((len(texts), *module.latent_shape), stream("latent spread", 0), module.device)
        conditioning = module.embeddings(texts)
        if number == 0:
            predict = module.predictor("teacher", conditioning, module.teacher_guidance)
            latents = module.family.sample_teacher(predict, noise, options.steps, streams_of(noise))
            print(f"{latents.std():.3f}  teacher, {options.steps} steps, guided", flush=True)
        rng = stream("generate", module.seed)
        latents = rollout(module.predictor("ema", conditioning), noise, module.sigmas, module.sampler, rng).x0
        print(f"{latents.std():.3f}  {path}", flush=True)


if __name__ == "__main__":
    main()
