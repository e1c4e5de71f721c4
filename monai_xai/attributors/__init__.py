"""Attributors: how a score is attributed to the inputs. The only floor that imports Captum."""

from monai_xai.attributors.backprop import DeepLift, GuidedBackprop
from monai_xai.attributors.base import Attribution, Attributor
from monai_xai.attributors.cam import GradCam, GradCamPlusPlus, HiResCam
from monai_xai.attributors.gradients import GradientShap, InputXGradient, NoiseTunnel, Saliency
from monai_xai.attributors.integrated import IntegratedGradients
from monai_xai.attributors.perturbation import FeatureAblation, Occlusion

__all__ = [
    "Attribution",
    "Attributor",
    "DeepLift",
    "FeatureAblation",
    "GradCam",
    "GradCamPlusPlus",
    "GradientShap",
    "GuidedBackprop",
    "HiResCam",
    "InputXGradient",
    "IntegratedGradients",
    "NoiseTunnel",
    "Occlusion",
    "Saliency",
]
