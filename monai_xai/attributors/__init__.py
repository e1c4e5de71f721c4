"""Attributors: how a score is attributed to the inputs. The only floor that imports Captum."""

from monai_xai.attributors.attention import AttentionRollout
from monai_xai.attributors.backprop import Deconvolution, GuidedBackprop
from monai_xai.attributors.base import Attribution, Attributor
from monai_xai.attributors.cam import (
    AblationCam,
    EigenCam,
    GradCam,
    GradCamPlusPlus,
    GuidedGradCam,
    HiResCam,
    LayerCam,
    ScoreCam,
    SegXResCam,
    XGradCam,
)
from monai_xai.attributors.coalitions import (
    FeaturePermutation,
    KernelShap,
    Lime,
    Rise,
    ShapleyValues,
    ShapleyValueSampling,
)
from monai_xai.attributors.deeplift import DeepLift
from monai_xai.attributors.extremal import ExtremalPerturbation
from monai_xai.attributors.fullgrad import FullGrad
from monai_xai.attributors.gradients import GradientShap, InputXGradient, NoiseTunnel, Saliency
from monai_xai.attributors.integrated import IntegratedGradients
from monai_xai.attributors.layers import InternalInfluence, Layer, LayerActivation, LayerConductance, Neuron
from monai_xai.attributors.lrp import (
    LRP,
    AlphaBetaRule,
    BoxRule,
    EpsilonRule,
    ExcitationBackprop,
    ExcitationRule,
    FlatRule,
    GammaRule,
    PropagationRule,
    ZPlusRule,
)
from monai_xai.attributors.occlusion import Occlusion
from monai_xai.attributors.paths import BlurIntegratedGradients, GuidedIntegratedGradients
from monai_xai.attributors.perturbation import FeatureAblation

__all__ = [
    "LRP",
    "AblationCam",
    "AlphaBetaRule",
    "AttentionRollout",
    "Attribution",
    "Attributor",
    "BlurIntegratedGradients",
    "BoxRule",
    "Deconvolution",
    "DeepLift",
    "EigenCam",
    "EpsilonRule",
    "ExcitationBackprop",
    "ExcitationRule",
    "ExtremalPerturbation",
    "FeatureAblation",
    "FeaturePermutation",
    "FlatRule",
    "FullGrad",
    "GammaRule",
    "GradCam",
    "GradCamPlusPlus",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCam",
    "GuidedIntegratedGradients",
    "HiResCam",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "KernelShap",
    "Layer",
    "LayerActivation",
    "LayerCam",
    "LayerConductance",
    "Lime",
    "Neuron",
    "NoiseTunnel",
    "Occlusion",
    "PropagationRule",
    "Rise",
    "Saliency",
    "ScoreCam",
    "SegXResCam",
    "ShapleyValueSampling",
    "ShapleyValues",
    "XGradCam",
    "ZPlusRule",
]
