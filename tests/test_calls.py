"""Inputs by position, by keyword, as one mapping or sequence, and whole numbers through their embedding."""

from __future__ import annotations

import pytest
import torch
from networks import ImageAndVector, random_image
from torch import nn

from monai_xai import (
    Constant,
    DeepLift,
    Explainer,
    FeatureAblation,
    InputError,
    IntegratedGradients,
    OutputScore,
    RegionScore,
    Saliency,
    UnsupportedNetworkError,
)

INPUTS = {"image": random_image(1, 1, 16, 16), "clinical": random_image(1, 3)}


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = ImageAndVector()

    def forward(self, image, *, clinical):
        return self.network(image, clinical)


class ByMapping(ByKeyword):
    def forward(self, inputs):
        return self.network(inputs["image"], inputs["clinical"])


class BySequence(ByKeyword):
    def forward(self, inputs):
        image, clinical = inputs
        return self.network(image, clinical)


@pytest.mark.parametrize(
    ("network", "call"),
    [(ByKeyword, ("clinical",)), (ByMapping, "mapping"), (BySequence, "sequence")],
    ids=["keyword", "mapping", "sequence"],
)
@pytest.mark.parametrize("method", [Saliency(), FeatureAblation()], ids=lambda m: m.name)
def test_every_form_of_call_gives_the_same_maps(network, call, method):
    target = RegionScore(1, torch.ones(16, 16))
    expected = Explainer(target, method)(ImageAndVector(), INPUTS)
    found = Explainer(target, method, call=call)(network(), INPUTS)
    for name, values in expected.attributions.items():
        torch.testing.assert_close(found.attributions[name], values, rtol=0, atol=0)


def test_a_keyword_that_is_no_input_is_named():
    explainer = Explainer(RegionScore(1, torch.ones(16, 16)), Saliency(), call=("age",))
    with pytest.raises(InputError, match=r"\['age'\] are to go by keyword"):
        explainer(ByKeyword(), INPUTS)


class Report(nn.Module):
    """Scores an image and the tokens of a report."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.other = nn.Embedding(20, 4)
        self.words = nn.Embedding(20, 4)
        self.read = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.double()

    def forward(self, image, tokens):
        return image.mean((1, 2, 3))[:, None] + self.read(self.words(tokens)).sum((1, 2))[:, None]


TOKENS = {"image": random_image(2, 1, 4, 4), "report": torch.tensor([[3, 7, 7, 0], [1, 2, 0, 0]])}


def test_tokens_are_explained_at_their_embedding_and_add_up():
    network = Report()
    baseline = {"image": 0.0, "report": Constant(0)}
    explanation = Explainer(OutputScore(), IntegratedGradients(64, baseline))(network, TOKENS)
    maps = explanation.attributions["report"]
    assert maps.shape == TOKENS["report"].shape
    assert explanation.delta.abs().max() < 1e-6
    assert maps[0, 3] == maps[1, 2] == 0  # the padding is its own baseline
    with torch.no_grad():
        token = network.read(network.words.weight).sum(1)
    torch.testing.assert_close(maps, (token[TOKENS["report"]] - token[0]), rtol=0, atol=1e-6)


def test_taking_a_token_away_is_to_put_the_baseline_token_in_its_place():
    network = Report()
    baseline = {"image": 0.0, "report": Constant(5)}
    explanation = Explainer(OutputScore(), FeatureAblation(baseline=baseline))(network, TOKENS)
    changed = TOKENS["report"].clone()
    changed[:, 1] = 5
    expected = network(*TOKENS.values()) - network(TOKENS["image"], changed)
    torch.testing.assert_close(
        explanation.attributions["report"][:, 1:2], expected.detach(), rtol=0, atol=1e-12
    )


def test_a_blurred_token_is_refused():
    with pytest.raises(InputError, match="'report' holds whole numbers, for which Blur"):
        Explainer(OutputScore(), DeepLift())(Report(), TOKENS)


def test_whole_numbers_without_an_embedding_are_named():
    class Plain(nn.Module):
        def forward(self, image, codes):
            return image.mean((1, 2, 3))[:, None] + codes.sum(1, keepdim=True)

    with pytest.raises(UnsupportedNetworkError, match="'report' holds whole numbers"):
        Explainer(OutputScore(), Saliency())(Plain(), TOKENS)


def test_the_embedding_may_be_named():
    network = Report()
    named = Explainer(OutputScore(), Saliency(), embeddings={"report": "words"})(network, TOKENS)
    seen = Explainer(OutputScore(), Saliency())(network, TOKENS)
    assert torch.equal(named.attributions["report"], seen.attributions["report"])
    assert not network.words._forward_hooks
