"""Attributors: how a score is attributed to the inputs. The only floor that imports Captum."""

from monai_xai.attributors.backprop import Deconvolution, GuidedBackprop
from monai_xai.attributors.base import Attribution, Attributor
from monai_xai.attributors.cam import GradCam, GradCamPlusPlus, HiResCam
from monai_xai.attributors.deeplift import DeepLift
from monai_xai.attributors.gradients import GradientShap, InputXGradient, NoiseTunnel, Saliency
from monai_xai.attributors.integrated import IntegratedGradients
from monai_xai.attributors.lrp import (
    LRP,
    AlphaBetaRule,
    BoxRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    PropagationRule,
    ZPlusRule,
)
from monai_xai.attributors.perturbation import FeatureAblation, Occlusion

__all__ = [
    "LRP",
    "AlphaBetaRule",
    "Attribution",
    "Attributor",
    "BoxRule",
    "Deconvolution",
    "DeepLift",
    "EpsilonRule",
    "FeatureAblation",
    "FlatRule",
    "GammaRule",
    "GradCam",
    "GradCamPlusPlus",
    "GradientShap",
    "GuidedBackprop",
    "HiResCam",
    "InputXGradient",
    "IntegratedGradients",
    "NoiseTunnel",
    "Occlusion",
    "PropagationRule",
    "Saliency",
    "ZPlusRule",
]
