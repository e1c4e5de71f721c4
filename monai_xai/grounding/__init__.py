"""Is an explanation grounded, or a picture? Tests with nulls, and the verdict that follows from them."""

from monai_xai.grounding.procedure import ground
from monai_xai.grounding.words import (
    GroundedCase,
    Grounding,
    GroundingCase,
    GroundingSettings,
    GroundingTest,
    Status,
    Verdict,
)

__all__ = [
    "GroundedCase",
    "Grounding",
    "GroundingCase",
    "GroundingSettings",
    "GroundingTest",
    "Status",
    "Verdict",
    "ground",
]
