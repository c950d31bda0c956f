"""Every class that a configuration can name without its module path.

Importing this registers them with jsonargparse; none of these modules imports diffusers or transformers until used.
"""

from gdmd_lightning.callbacks.collapse_watch import CollapseWatch
from gdmd_lightning.callbacks.evaluation import GenerationEvaluation
from gdmd_lightning.callbacks.evaluation_budget import EvaluationBudget
from gdmd_lightning.callbacks.gradient_record import GradientRewardRecord
from gdmd_lightning.callbacks.variety import GenerationVariety
from gdmd_lightning.data.images import CaptionedImages, ShapesImages
from gdmd_lightning.families.flux2 import Flux2Family, Flux2KleinFamily
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.geneval.answers import QwenVLAnswers
from gdmd_lightning.geneval.mask2former import Mask2FormerDetector
from gdmd_lightning.methods.ac_dmd import ACDMD
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.dmd2 import DMD2
from gdmd_lightning.methods.dmdr import DMDR
from gdmd_lightning.methods.flow_grpo import FlowGRPO
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.gndm import GNDM, GNDMR
from gdmd_lightning.methods.nft import DiffusionNFT
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.methods.rtdmd import RTDMD
from gdmd_lightning.metrics.geneval2 import GenEval2Score
from gdmd_lightning.metrics.scores import GenEvalScore, RewardScore
from gdmd_lightning.rewards.aesthetic import AestheticScore
from gdmd_lightning.rewards.clip import CLIPScore, ContrastiveReward, PickScore
from gdmd_lightning.rewards.combine import CombinedReward
from gdmd_lightning.rewards.geneval import GenEvalReward
from gdmd_lightning.rewards.geneval2 import GenEval2Reward
from gdmd_lightning.rewards.hpsv2 import HPSv2
from gdmd_lightning.rewards.hpsv3 import HPSv3
from gdmd_lightning.rewards.image_reward import ImageReward
from gdmd_lightning.rewards.ocr import OCRReward
from gdmd_lightning.rewards.shapes import ShapesReward
from gdmd_lightning.samplers import CPS, ODE, SDE, Renoise
from gdmd_lightning.schedules import LogitNormal, Uniform, UniformTimestep
from gdmd_lightning.strategies import FSDP2Strategy, MultiEngineDeepSpeedStrategy

__all__ = [
    "ACDMD",
    "CPS",
    "DMD",
    "DMD2",
    "DMDR",
    "GDMD",
    "GNDM",
    "GNDMR",
    "ODE",
    "RTDMD",
    "SDE",
    "AestheticScore",
    "CLIPScore",
    "CaptionedImages",
    "CollapseWatch",
    "CombinedReward",
    "ContrastiveReward",
    "DiffusionNFT",
    "EvaluationBudget",
    "FSDP2Strategy",
    "FlowGRPO",
    "Flux2Family",
    "Flux2KleinFamily",
    "GenEval2Reward",
    "GenEval2Score",
    "GenEvalReward",
    "GenEvalScore",
    "GenerationEvaluation",
    "GenerationVariety",
    "GradientRewardRecord",
    "HPSv2",
    "HPSv3",
    "ImageReward",
    "LogitNormal",
    "Mask2FormerDetector",
    "MultiEngineDeepSpeedStrategy",
    "OCRReward",
    "PickScore",
    "QwenVLAnswers",
    "ReFL",
    "Renoise",
    "RewardScore",
    "SD3Family",
    "SDXLFamily",
    "ShapesImages",
    "ShapesReward",
    "Uniform",
    "UniformTimestep",
]
