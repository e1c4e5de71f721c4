"""An inferer that returns attributions, to be used in place of any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from monai.inferers import Inferer
from torch import Tensor

from monai_xai.errors import InputError
from monai_xai.explainer import Explainer
from monai_xai.explanation import Explanation


class AttributionInferer(Inferer):
    """An inferer that returns the attribution of its input in place of the network's prediction.

    Args:
        explainer: what, how and over what extent, for a single target; its own inferer applies the network.
    """

    def __init__(self, explainer: Explainer) -> None:
        super().__init__()
        self.explainer = explainer

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the attribution of the inputs, shape (N, C, *spatial).

        Args:
            inputs: the image, shape (N, C, *spatial).
            network: a ``torch.nn.Module``.
            args: further inputs of the network, in call order; they are explained too, but not returned.
            kwargs: must be empty.
        """
        if kwargs:
            raise InputError(f"AttributionInferer takes inputs by position, got keywords {sorted(kwargs)}.")
        named = {"image": inputs} | {f"input{i + 1}": x for i, x in enumerate(args)}
        explanation = self.explainer(network, named)  # type: ignore[arg-type]
        if not isinstance(explanation, Explanation):
            raise InputError(
                f"AttributionInferer needs an explainer for one target, got {sorted(explanation)}."
            )
        return explanation.attributions["image"]
