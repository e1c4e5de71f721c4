"""Features: the pieces of an input that perturbation methods take away together."""

from monai_xai.features.anatomy import Atlas, Components, read_names
from monai_xai.features.base import (
    Blocks,
    CaseFeatures,
    Channels,
    FeatureMask,
    Features,
    FeaturesLike,
    PlacedFeatures,
    as_features,
    channel_names,
    crossed,
    feature_masks,
)
from monai_xai.features.supervoxels import Supervoxels

__all__ = [
    "Atlas",
    "Blocks",
    "CaseFeatures",
    "Channels",
    "Components",
    "FeatureMask",
    "Features",
    "FeaturesLike",
    "PlacedFeatures",
    "Supervoxels",
    "as_features",
    "channel_names",
    "crossed",
    "feature_masks",
    "read_names",
]
