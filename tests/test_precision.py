"""Lower precision on request, and single precision after all where attributions do not add up."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from torch import Tensor, nn

from monai_xai import (
    Box,
    Constant,
    DeepLift,
    Explainer,
    InputError,
    IntegratedGradients,
    PrecisionWarning,
    Predicted,
    RegionScore,
    Saliency,
)
from monai_xai.calls import ReplayedInferer

REGION = RegionScore(1, Box((4, 4), (20, 20)))


@pytest.fixture
def network() -> UNet:
    torch.manual_seed(0)
    return UNet(2, 2, 2, (8, 16), (2,), norm="BATCH").eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(1))


class Offset(nn.Module):
    """A network whose output is so far from 0 that few digits tell nothing of the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(2, 2, 3, padding=1)
        nn.init.constant_(self.convolution.bias, 1000.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)


def precisely(explainer_arguments: dict[str, object], network: nn.Module, image: Tensor) -> Tensor:
    """Return the map of a method that is integrated until it adds up."""
    method = IntegratedGradients(baseline=Constant(0.0))
    found = Explainer(REGION, method, progress=False, **explainer_arguments)(network, image)  # type: ignore[arg-type]
    return found.attributions["image"]  # type: ignore[union-attr]


@pytest.mark.parametrize("inferer", [None, SlidingWindowInferer(16, overlap=0.5)])
def test_network_computes_in_bfloat16_and_the_rest_does_not(
    network: UNet, image: Tensor, inferer: SlidingWindowInferer | None
) -> None:
    seen: set[torch.dtype] = set()
    with torch.no_grad():
        prediction = network(image)
    handle = network.model[0].register_forward_hook(lambda *arguments: seen.add(arguments[2].dtype))
    explainer = Explainer(
        REGION,
        IntegratedGradients(baseline=Constant(0.0)),
        inferer,
        progress=False,
        autocast="bfloat16",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrecisionWarning)
        explanation = explainer(network, image, prediction=prediction)
    handle.remove()
    assert seen == {torch.bfloat16}
    assert explanation.facts["precision"] == "bfloat16"  # type: ignore[union-attr]
    assert float(explanation.gap) < 0.05  # type: ignore[union-attr, arg-type]
    map_ = explanation.attributions["image"]  # type: ignore[union-attr]
    exact = precisely({"inferer": inferer}, network, image)
    assert map_.dtype == torch.float32
    assert 0 < (map_ - exact).norm() < 0.1 * exact.norm()
    assert not torch.is_autocast_enabled("cpu")


def test_case_that_does_not_add_up_is_explained_in_single_precision(image: Tensor) -> None:
    network = Offset().eval()
    explainer = Explainer(
        REGION, IntegratedGradients(baseline=Constant(0.0)), progress=False, autocast="bfloat16"
    )
    with pytest.warns(PrecisionWarning, match="in bfloat16: .*explained again in float32"):
        explanation = explainer(network, image)
    assert explanation.facts["precision"] == "float32"  # type: ignore[union-attr]
    assert float(explanation.gap) < 0.01  # type: ignore[union-attr, arg-type]
    assert torch.equal(explanation.attributions["image"], precisely({}, network, image))  # type: ignore[union-attr]


def test_next_case_is_tried_in_lower_precision_again(network: UNet, image: Tensor) -> None:
    explainer = Explainer(
        REGION, IntegratedGradients(baseline=Constant(0.0)), progress=False, autocast="bfloat16"
    )
    with pytest.warns(PrecisionWarning):
        explainer(Offset().eval(), image)
    assert explainer(network, image).facts["precision"] == "bfloat16"  # type: ignore[union-attr]


def test_nothing_is_said_of_precision_that_was_no_choice(network: UNet, image: Tensor) -> None:
    explanation = Explainer(REGION, IntegratedGradients(), progress=False)(network, image)
    assert "precision" not in explanation.facts  # type: ignore[union-attr]


def test_target_selects_in_single_precision(image: Tensor) -> None:
    """In bfloat16 all logits of this network are equal, so that nothing is predicted."""
    network, method = Offset().eval(), IntegratedGradients(baseline=Constant(0.0))
    explainer = Explainer(RegionScore(1, Predicted()), method, progress=False, autocast="bfloat16")
    with pytest.warns(PrecisionWarning):
        found = explainer(network, image)
    exact = Explainer(RegionScore(1, Predicted()), method, progress=False)(network, image)
    assert torch.equal(found.attributions["image"], exact.attributions["image"])  # type: ignore[union-attr]


def test_windows_are_not_refined_below_what_few_digits_can_tell(network: UNet, image: Tensor) -> None:
    passes = {}
    for autocast in (None, "bfloat16"):
        explainer = Explainer(
            REGION,
            IntegratedGradients(baseline=Constant(0.0)),
            SlidingWindowInferer(8, overlap=0.5),
            progress=False,
            autocast=autocast,  # type: ignore[arg-type]
        )
        passes[autocast] = float(explainer(network, image).facts["passes"])  # type: ignore[union-attr, arg-type]
    assert passes["bfloat16"] <= 2 * passes[None]


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


def test_output_may_be_a_named_tuple(network: UNet, image: Tensor) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Named:
            return Named(self.network(x), x)

    target = RegionScore(1, Box((4, 4), (20, 20)), head=0)
    method = IntegratedGradients(baseline=Constant(0.0))
    explanation = Explainer(target, method, progress=False, autocast="bfloat16")(Several().eval(), image)
    assert explanation.facts["precision"] == "bfloat16"  # type: ignore[union-attr]


def test_replayed_call_is_refused(network: UNet, image: Tensor) -> None:
    inferer = ReplayedInferer(SlidingWindowInferer(16), (), {})
    explainer = Explainer(REGION, IntegratedGradients(), inferer, progress=False, autocast="bfloat16")
    with pytest.raises(InputError, match="replayed as it is"):
        explainer(network, image)


@pytest.mark.parametrize("method", [Saliency(), DeepLift()])
def test_method_whose_gap_does_not_tell_is_refused(method: Saliency | DeepLift) -> None:
    with pytest.raises(InputError, match="no completeness gap that tells whether bfloat16 is enough"):
        Explainer(REGION, method, autocast="bfloat16")


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="choose 'bfloat16' or 'float16'"):
        Explainer(REGION, IntegratedGradients(), autocast="half")  # type: ignore[arg-type]


def test_double_precision_is_not_lowered(network: UNet, image: Tensor) -> None:
    explainer = Explainer(REGION, IntegratedGradients(), progress=False, autocast="bfloat16")
    with pytest.raises(InputError, match=r"lowers float32, the input 'image' is torch\.float64"):
        explainer(network.double(), image.double())
