"""Prediction, not measurement: time and memory of an update of GDMD with ZeRO-3 on many GPUs, for 2B and 12B teachers.

.venv/bin/python benchmarks/predicting.py [--gpus 8 32 128 512] [--tflops 400] [--utilization 0.4] [--bandwidth_gb 50]

The configurations are sd3.yaml (2.1 billion parameters) and flux2.yaml with a FLUX.2 klein widened to 12 billion, both
with zero3.yaml, 1024x1024 pixels, embeddings computed before the training, 4 samples per prompt. Floating-point
operations of an evaluation and of decoding are counted on the meta device; how often networks are evaluated and called
is counted in a real update, in the same micro-batches, of a tiny pipeline. Memory is that of ``plan``. Bytes per GPU
are those of ZeRO-3: weights are gathered for each call of a network, once more for a backward pass, and gradients are
scattered after each. The reward is left out of the time, and so is any limit of a real machine that is no option here.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluations import Counting
from random_teachers import method, train, write_pipeline
from scaling import Row, row_of

from gdmd_lightning.configuration.training import parse
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.families.sketch import ARCHITECTURES
from gdmd_lightning.planning.report import plan_of_settings

GROUP, STEPS, TARGETS, FAKE_SCORE_UPDATES = 4, 4, 4, 10
"""Those of sd3.yaml and flux2.yaml."""
TEACHER_BYTES, TRAINED_BYTES = 2, 4
"""Per number: the teacher is in bfloat16; ZeRO-3's weights and gradients of the others are in float32."""
SIDE = 1024
WIDE: Mapping[str, int] = {"num_attention_heads": 32, "num_layers": 8, "num_single_layers": 36}
"""FLUX.2 klein with 12 billion parameters; 4B has 24, 5 and 20, 9B has 32, 8 and 24."""


@dataclass(frozen=True)
class Work:
    """What an update asks on one GPU, of all roles but the teacher, and of the teacher.

    Args:
        evaluations, teacher: Rows evaluated.
        trained: Rows with a backward pass.
        calls, teacher_calls: Forward passes.
        learning: Forward passes with a gradient.
        backward: Backward passes; the generator's goes through its samples and its targets.
        decoded: Pictures decoded.
    """

    evaluations: float
    teacher: float
    trained: float
    calls: float
    teacher_calls: float
    learning: float
    backward: float
    decoded: float

    def flops(self, row: Row) -> float:
        """With gradient checkpointing, a backward pass costs three evaluations."""
        return row.flops * (self.evaluations + self.teacher + 3 * self.trained) + row.decoding * self.decoded

    def sent(self, row: Row, gpus: int) -> float:
        """Bytes that each GPU sends, and receives."""
        gathers = TRAINED_BYTES * (self.calls + self.learning) + TEACHER_BYTES * self.teacher_calls
        scatters = TRAINED_BYTES * self.backward
        return (gathers + scatters) * row.parameters * (gpus - 1) / gpus


@dataclass(frozen=True)
class Machine:
    """Assumptions.

    Args:
        tflops: Peak of a GPU, in 1e12 operations per second.
        utilization: Share of it that an evaluation reaches.
        bandwidth_gb: 1e9 bytes per second that a GPU sends, and receives at the same time.
    """

    tflops: float
    utilization: float
    bandwidth_gb: float

    def seconds(self, flops: float, sent: float) -> tuple[float, float]:
        """Of computing and of communicating."""
        return flops / (1e12 * self.tflops * self.utilization), sent / (1e9 * self.bandwidth_gb)


@dataclass(frozen=True)
class Prediction:
    """One line.

    Args:
        model: Of the teacher.
        scaling: ``weak``: samples per GPU are fixed; ``strong``: those of an update are.
        gpus: Their number.
        samples: Per GPU and update.
        computing, communicating: Seconds of an update.
        gib: Of a GPU.
    """

    model: str
    scaling: str
    gpus: int
    samples: int
    computing: float
    communicating: float
    gib: float

    @property
    def updates(self) -> tuple[float, float]:
        """Per hour: if nothing overlaps, and if the shorter part is hidden."""
        both = self.computing, self.communicating
        return 3600 / sum(both), 3600 / max(both)


def work(samples: int, micro: int, pipeline: Path) -> Work:
    """Counted in one real update; of many micro-batches, those of 16 and of 32 samples are, since all are alike."""
    whole = STEPS * GROUP  # as many prompts as steps
    if samples > 2 * whole and samples % whole == 0:
        one, two = (asdict(work(n * whole, micro, pipeline)) for n in (1, 2))
        return Work(**{name: one[name] + (two[name] - one[name]) * (samples / whole - 1) for name in one})
    module = method(
        "GDMD", pipeline, TARGETS, FAKE_SCORE_UPDATES, STEPS, micro_batch_size=micro if micro < samples else None
    )
    counting = Counting()
    train(module, 1, samples, GROUP, counting)
    asked = counting.asked
    teacher, others = asked.networks["teacher"], [c for name, c in asked.networks.items() if name != "teacher"]
    learning = sum(each.learning for each in others)
    backward = learning - asked.networks["generator"].learning / 2
    return Work(
        sum(each.all for each in others), teacher.all, sum(each.trained for each in others),
        sum(each.calls for each in others), teacher.calls, learning, backward, asked.decoded,
    )  # fmt: skip


def families(directory: Path) -> dict[str, tuple[ModelFamily, list[str]]]:
    """Each teacher and the arguments of ``fit`` that name it."""
    wide = directory / "wide"
    shutil.copytree(ARCHITECTURES / "black-forest-labs" / "FLUX.2-klein-base-4B", wide)
    (wide / "tokenizer").mkdir()  # which no plan reads
    config = wide / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | WIDE), encoding="utf-8")
    sd3 = "stabilityai/stable-diffusion-3-medium-diffusers"
    flux = ["--config", "flux2.yaml", "--config", "zero3.yaml", f"--model.family.init_args.path={wide}"]
    return {
        "SD3 Medium": (SD3Family(sd3, dtype="bfloat16"), ["--config", "sd3.yaml", "--config", "zero3.yaml"]),
        "FLUX.2-like": (Flux2KleinFamily(str(wide), dtype="bfloat16"), flux),
    }


def memory(arguments: list[str], gpus: int, samples: int, micro: int, directory: Path) -> float:
    """GiB of a GPU, by ``plan``."""
    nodes = max(gpus // 8, 1)
    batch = [f"--data.batch_size={samples}", f"--model.micro_batch_size={min(micro, samples)}"]
    size = [f"--model.height={SIDE}", f"--model.width={SIDE}"]
    place = [f"--trainer.devices={gpus // nodes}", f"--trainer.num_nodes={nodes}"]
    encoders = [f"--model.embedding_cache.directory={directory / 'embeddings'}"]
    return plan_of_settings(parse([*arguments, *batch, *size, *place, *encoders], "plan"))[0].total / 2**30


def predicted(options: Any, directory: Path) -> Iterator[tuple[Prediction, Row]]:
    """All lines, each with what an evaluation of its teacher is."""
    machine = Machine(options.tflops, options.utilization, options.bandwidth_gb)
    tiny = write_pipeline(directory / "tiny", 1, 1)
    for model, (family, arguments) in families(directory).items():
        row = row_of(family, SIDE, SIDE)
        for scaling in ("weak", "strong"):
            for gpus in options.gpus:
                samples = options.samples if scaling == "weak" else options.global_batch // gpus
                asked = work(samples, options.micro_batch_size, tiny)
                both = machine.seconds(asked.flops(row), asked.sent(row, gpus))
                gib = memory(arguments, gpus, samples, options.micro_batch_size, directory)
                yield Prediction(model, scaling, gpus, samples, *both, gib), row


def line(each: Prediction, row: Row) -> str:
    """A line of the table."""
    apart, hidden = each.updates
    cells = [f"{each.model}, {row.parameters / 1e9:.1f} B", each.scaling, each.gpus, each.samples]
    cells += [each.gpus * each.samples, f"{each.gib:.1f}", f"{each.computing:.1f}", f"{each.communicating:.1f}"]
    return f"| {' | '.join(map(str, cells))} | {apart:.1f} to {hidden:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 32, 128, 512], help="8 per node")
    parser.add_argument("--samples", type=int, default=16, help="per GPU and update, weak scaling")
    parser.add_argument("--global_batch", type=int, default=2048, help="samples per update, strong scaling")
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--tflops", type=float, default=400.0, help="peak of a GPU, assumed")
    parser.add_argument("--utilization", type=float, default=0.4, help="share of it that is reached, assumed")
    parser.add_argument("--bandwidth_gb", type=float, default=50.0, help="1e9 bytes per second and GPU, assumed")
    parser.add_argument("--output", type=Path, help="file for the lines, as JSON")
    options = parser.parse_args()
    if any(gpus < 1 or options.global_batch % (gpus * GROUP) for gpus in options.gpus) or options.samples % GROUP:
        parser.error(f"samples per GPU must be whole groups of {GROUP}, in --samples and in --global_batch / --gpus")
    if not (0 < options.utilization <= 1 and math.inf > options.tflops > 0 and math.inf > options.bandwidth_gb > 0):
        parser.error("--tflops and --bandwidth_gb must be above 0, and --utilization in (0, 1]")
    print(
        f"Prediction. Assumed: {options.tflops:g} TFLOP/s per GPU at its peak, of which {options.utilization:.0%} are "
        f"reached;\n{options.bandwidth_gb:g} GB/s per GPU; micro-batches of {options.micro_batch_size}; no latency, "
        "no waiting for the slowest, no reward.\n"
    )
    print("| teacher | scaling | GPUs | samples per GPU | samples | GiB per GPU | computing, s | communicating, s |"
          " updates per hour |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for each, row in predicted(options, Path(directory)):
            found.append({**asdict(each), "updates_per_hour": each.updates})
            print(line(each, row), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
