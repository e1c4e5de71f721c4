"""monai_xai: explanations inside MONAI's training and inference loops."""

from monai_xai.attributors import (
    Attribution,
    Attributor,
    DeepLift,
    FeatureAblation,
    GradCam,
    GradCamPlusPlus,
    GradientShap,
    GuidedBackprop,
    HiResCam,
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from monai_xai.baselines import Baseline, Blur, ChannelMinimum, Constant, Mean, Noise, Samples
from monai_xai.cases import WorstCases
from monai_xai.cohorts import ModalityCohort
from monai_xai.errors import (
    AttributionError,
    EmptyRegionError,
    InputError,
    UnsupportedInfererError,
    UnsupportedNetworkError,
    XaiError,
)
from monai_xai.explainer import CompletenessWarning, Explainer
from monai_xai.explanation import Explanation
from monai_xai.features import Blocks, Channels, FeatureMask, Features, channel_names
from monai_xai.handlers import AttributionEvents, AttributionHandler, ExplainedCase, ModalityCohortHandler
from monai_xai.inferers import AttributionInferer
from monai_xai.modalities import ModalityExplanation, ModalityShapley, additive_projection, perceptual_score
from monai_xai.regions import Box, Component, Labeled, Mask, Predicted, Region, Voxel
from monai_xai.tables import ClinicalVariables, Reading, ReferenceRecord, TableSchema, Variable
from monai_xai.targets import (
    ClassScore,
    DiceScore,
    FunctionTarget,
    MarginScore,
    OutputScore,
    RegionScore,
    Target,
)
from monai_xai.tensorboard import TensorBoardAttributionHandler
from monai_xai.transforms import AtomicNibabelWriter, Explain, Explaind, FlattenAttributionsd
from monai_xai.windows import StitchedNetwork

__version__ = "0.1.0"

__all__ = [
    "AtomicNibabelWriter",
    "Attribution",
    "AttributionError",
    "AttributionEvents",
    "AttributionHandler",
    "AttributionInferer",
    "Attributor",
    "Baseline",
    "Blocks",
    "Blur",
    "Box",
    "ChannelMinimum",
    "Channels",
    "ClassScore",
    "ClinicalVariables",
    "CompletenessWarning",
    "Component",
    "Constant",
    "DeepLift",
    "DiceScore",
    "EmptyRegionError",
    "Explain",
    "Explaind",
    "ExplainedCase",
    "Explainer",
    "Explanation",
    "FeatureAblation",
    "FeatureMask",
    "Features",
    "FlattenAttributionsd",
    "FunctionTarget",
    "GradCam",
    "GradCamPlusPlus",
    "GradientShap",
    "GuidedBackprop",
    "HiResCam",
    "InputError",
    "InputXGradient",
    "IntegratedGradients",
    "Labeled",
    "MarginScore",
    "Mask",
    "Mean",
    "ModalityCohort",
    "ModalityCohortHandler",
    "ModalityExplanation",
    "ModalityShapley",
    "Noise",
    "NoiseTunnel",
    "Occlusion",
    "OutputScore",
    "Predicted",
    "Reading",
    "ReferenceRecord",
    "Region",
    "RegionScore",
    "Saliency",
    "Samples",
    "StitchedNetwork",
    "TableSchema",
    "Target",
    "TensorBoardAttributionHandler",
    "UnsupportedInfererError",
    "UnsupportedNetworkError",
    "Variable",
    "Voxel",
    "WorstCases",
    "XaiError",
    "additive_projection",
    "channel_names",
    "perceptual_score",
]
