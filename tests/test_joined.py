"""Gradients of several windows in one call of the network: the same as one by one, and only where that is safe."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from networks import Rows, random_image, small_unet
from torch import Tensor, nn

from monai_xai import (
    AttributionError,
    Blur,
    Box,
    Explainer,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
    RegionScore,
    Saliency,
    joined,
)
from monai_xai.calls import CalledNetwork
from monai_xai.forward import Scoring
from monai_xai.joined import JoinedScores, OutOfMemoryWarning
from monai_xai.memory import LiveTensors
from monai_xai.perturbed import CachedScore
from monai_xai.terms import ScoreFunction, WholeTerm
from monai_xai.trials import Trial

INFERER = SlidingWindowInferer((16, 16), overlap=0.5)
METHODS = {
    "Saliency": Saliency(),
    "InputXGradient": InputXGradient(),
    "adaptive": IntegratedGradients(baseline=Blur(), tolerance=0.002),
    "fixed": IntegratedGradients(7, Blur()),
    "GradientShap": GradientShap(5),
    "NoiseTunnel": NoiseTunnel(n_samples=3),
}
TARGETS = {
    "windows": RegionScore(1, Box((3, 5), (40, 30))),
    "stitched": lambda output: output.softmax(1)[:, 1].mean((1, 2)),
}


def explain(method, network, x, target="windows", inferer=INFERER, **options):
    explainer = Explainer(TARGETS[target], method, inferer, progress=False, tolerated_gap=10.0, **options)
    return explainer(network, x)


def score_of(network, x):
    """The score of whole images."""
    function = ScoreFunction(CalledNetwork(network, ["image"]), RegionScore(1), 1)
    return WholeTerm(function, (torch.ones_like(x),))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_the_size_of_batches(method, target):
    network, x = Rows(small_unet(), calls := [], traced=True), random_image(2, 2, 48, 40)
    one = explain(METHODS[method], network, x, target, memory_gib=1e-6)
    alone, together = calls.copy(), calls
    calls.clear()
    many = explain(METHODS[method], network, x, target, memory_gib=1.0)
    assert max(alone) == 1
    assert max(together) > 4
    assert len(together) < len(alone) / 3
    torch.testing.assert_close(one.score, many.score, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.attributions["image"], many.attributions["image"], rtol=0, atol=1e-12)
    assert one.facts == many.facts


@pytest.mark.parametrize("method", [IntegratedGradients(6), METHODS["adaptive"], GradientShap(3)], ids=str)
def test_small_batches_are_filled_too(method, monkeypatch):
    monkeypatch.setattr(joined, "MOST_PARTS", 3)
    network, x = Rows(small_unet(), calls := [], traced=True), random_image(1, 2, 48, 40)
    explain(method, network, x)
    assert sum(calls) > 2 * len(calls)


def test_a_network_that_sees_whole_inputs_gets_several_nodes_of_the_path_at_once():
    network, x = Rows(small_unet(), calls := [], traced=True), random_image(1, 2, 48, 40)
    found = explain(IntegratedGradients(12), network, x, inferer=None)
    assert found.facts["passes"] == 12
    assert len(calls) < 7
    reference = explain(IntegratedGradients(12), network, x, inferer=None, memory_gib=1e-6)
    torch.testing.assert_close(
        found.attributions["image"], reference.attributions["image"], rtol=0, atol=1e-12
    )


class BatchStatistics(nn.Module):
    """Centers on the mean of the whole batch: what a sample gives depends on its neighbors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_unet()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x - x.mean())


class OneByOne(nn.Module):
    """Refuses batches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_unet()

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == 1
        return self.body(x)


class BatchMaximum(nn.Module):
    """Scales by the largest value of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_unet()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x / (x.abs().amax() + 1))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "method", [Saliency(), IntegratedGradients(8, 0.0), IntegratedGradients(baseline=0.0)], ids=str
)
@pytest.mark.parametrize(
    "network", [BatchStatistics(), BatchMaximum(), OneByOne()], ids=lambda n: type(n).__name__
)
def test_where_samples_influence_each_other_windows_go_alone(network, method, target):
    x = random_image(1, 2, 48, 40)
    x[..., :20, :20] = 0.0  # windows that are all equal show nothing
    joint = explain(method, network, x, target)
    alone = explain(method, network, x, target, memory_gib=1e-6)
    torch.testing.assert_close(joint.attributions["image"], alone.attributions["image"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", range(5))
def test_one_part_that_all_others_depend_on_is_found_out_wherever_it_is(place):
    parts = list(random_image(5, 2, 16, 16).split(1))
    parts[place] = parts[place] * 20
    term = score_of(BatchMaximum(), parts[0])
    trials = [Trial(number, term, (part,)) for number, part in enumerate(parts)]
    together = torch.cat([score for _, score in JoinedScores()(trials)])
    torch.testing.assert_close(together, torch.cat([term((part,)) for part in parts]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("empty", range(3))
@pytest.mark.parametrize("place", range(3))
def test_what_is_constant_shows_nothing_and_is_not_asked(empty, place):
    """Of an empty window, a middling one and the one that both depend on, the empty one would not tell."""
    parts = list(random_image(4, 2, 16, 16).split(1))
    parts[1 + empty], parts[1 + place] = torch.zeros_like(parts[0]), parts[1 + place] * 20
    parts[1 + empty] = torch.zeros_like(parts[0])
    term = score_of(BatchMaximum(), parts[0])
    trials = [Trial(number, term, (part,)) for number, part in enumerate([*parts, *parts])]
    together = torch.cat([score for _, score in JoinedScores()(trials)])
    expected = torch.cat([term((part,)) for part in [*parts, *parts]])
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-12)


class ScoreAlone(torch.autograd.Function):
    """Adds nothing to the output, and the mean of the batch to its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + gradient.mean(0, keepdim=True)


class CoupledBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = small_unet()

    def forward(self, x: Tensor) -> Tensor:
        return ScoreAlone.apply(self.body(x))


def test_a_gradient_that_depends_on_the_batch_is_seen_though_the_score_does_not():
    network, x = CoupledBackward(), random_image(1, 2, 48, 40)
    joint = explain(Saliency(), network, x)
    alone = explain(Saliency(), network, x, memory_gib=1e-6)
    torch.testing.assert_close(joint.attributions["image"], alone.attributions["image"], rtol=0, atol=1e-12)


class Cramped(nn.Module):
    """Has no memory for the graph of more than two samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_unet()

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and len(x) > 2:
            raise torch.OutOfMemoryError("no room")
        return self.body(x)


def test_where_memory_does_not_hold_a_batch_smaller_ones_are_taken():
    network, x = Cramped(), random_image(1, 2, 48, 40)
    with pytest.warns(OutOfMemoryWarning):
        joint = explain(Saliency(), network, x)
    alone = explain(Saliency(), network, x, memory_gib=1e-6)
    torch.testing.assert_close(joint.attributions["image"], alone.attributions["image"], rtol=0, atol=1e-12)


def in_volumes() -> nn.Module:
    """Nothing but convolutions, which keep what goes into them."""
    network = nn.Sequential(*(nn.Conv3d(n, m, 3, padding=1) for n, m in ((2, 8), (8, 8), (8, 8), (8, 2))))
    return network.eval()


@pytest.mark.parametrize(
    ("network", "x", "size"),
    [
        (small_unet(), random_image(1, 2, 112, 112), (16, 16)),
        (in_volumes(), random_image(1, 2, 48, 48, 32).float(), (16, 16, 16)),
    ],
    ids=["images", "volumes"],
)
def test_memory_of_a_batch_of_windows_stays_within_what_is_allowed(network, x, size):
    def peak(method, gib):
        explainer = Explainer(
            RegionScore(1), method, SlidingWindowInferer(size, overlap=0.5),
            progress=False, tolerated_gap=10.0, memory_gib=gib,
        )  # fmt: skip
        with LiveTensors() as live:
            explainer(network, x)
        return live.peak

    for method in (Saliency(), IntegratedGradients(9), IntegratedGradients()):
        allowed = 2**-7 if len(size) == 3 else 2**-9
        assert peak(method, allowed) - peak(method, 1e-6) < 1.2 * allowed * 2**30


def test_a_batch_keeps_within_what_is_allowed_and_fills_what_is_quickest(monkeypatch):
    network = Rows(small_unet(), calls := [])
    parts = random_image(9, 2, 16, 16).split(1)
    term = score_of(network, parts[0])
    trials = [Trial(number, term, (part,)) for number, part in enumerate(parts)]
    with LiveTensors() as live:
        term(trials[0].part)
    room = 3.5 * (live.peak + trials[0].nbytes) / 2**30
    for joined_scores, most in ((JoinedScores(room), 3), (JoinedScores(), 4)):
        monkeypatch.setattr(JoinedScores, "_on_cpu", room)
        calls.clear()
        assert len(list(joined_scores(trials))) == 9
        assert max(calls) == most


def test_an_error_names_the_window_in_which_it_came():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_unet()

        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad and (x > 50).any():
                raise RuntimeError("seven")
            return self.body(x)

    x = random_image(1, 2, 48, 40)
    x[..., -1, -1] = 7000.0
    target = RegionScore(1, Box((0, 0), (48, 40)))
    for method in (Saliency(), IntegratedGradients(3, 0.0), IntegratedGradients(baseline=0.0)):
        with pytest.raises(
            RuntimeError, match=r"windows? .*20 of 20 failed on inputs \[\(1, 2, 16, 16\)\].*seven"
        ):
            Explainer(target, method, INFERER)(Fails(), x)


def test_a_network_with_sparse_tensors_goes_through():
    class Sparse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mixing = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=x.dtype).to_sparse()
            mixed = torch.sparse.mm(mixing, x.transpose(0, 1).flatten(1))
            return mixed.reshape(2, len(x), *x.shape[2:]).transpose(0, 1)

    found = explain(Saliency(), Sparse(), random_image(1, 2, 48, 40)).attributions["image"][0, :, 3:40, 5:30]
    torch.testing.assert_close(found, torch.zeros_like(found) + torch.tensor([0.0, 3 / 925])[:, None, None])


def test_memory_that_does_not_hold_one_input_is_refused_also_for_one():
    x = random_image(1, 2, 16, 16)
    term = score_of(small_unet(), x)
    score = CachedScore(Scoring({"image": x}, [term], memory_gib=1e-9))
    for _ in range(2):
        with pytest.raises(AttributionError, match="does not hold one call"):
            score((x,))
