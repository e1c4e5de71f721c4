"""Transforms: explanations in a MONAI pre- or post-processing pipeline, and saving them safely."""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.config import DtypeLike, KeysCollection, PathLike
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import FlattenSubKeysd, MapTransform, Transform
from monai.utils import ensure_tuple
from torch import Tensor, nn

from monai_xai.errors import InputError
from monai_xai.explainer import Explainer
from monai_xai.explanation import Explanation, is_place
from monai_xai.files import writing_whole
from monai_xai.networks import device_of

logger = logging.getLogger(__name__)
_PLACE = (
    *("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)
_CURES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free disk space")


class Explain(Transform):
    """Explain one channel-first image (or several inputs) without batch axis.

    Args:
        explainer: what, how and over what extent, for a single target.
        network: the network, on whose device the work is done.
    """

    def __init__(self, explainer: Explainer, network: nn.Module) -> None:
        self.explainer = explainer
        self.network = network

    def __call__(self, inputs: Tensor | Mapping[str, Tensor], label: Tensor | None = None) -> Any:
        """Return the attribution of one tensor, or attributions by input name.

        Args:
            inputs: shape (C, *spatial) or (F,), one tensor or several by name in call order.
            label: shape (C, *spatial), for regions that need one.
        """
        maps = self.explanation(inputs, label).attributions
        samples = {name: values[0] for name, values in maps.items()}
        return samples if isinstance(inputs, Mapping) else next(iter(samples.values()))

    def explanation(self, inputs: Tensor | Mapping[str, Tensor], label: Tensor | None = None) -> Explanation:
        """Return the whole explanation, with a batch axis of one, on the device of the inputs."""
        device = device_of(self.network)
        batch = (
            {k: _batched(x, device) for k, x in inputs.items()}
            if isinstance(inputs, Mapping)
            else _batched(inputs, device)
        )
        found = self.explainer(self.network, batch, label=None if label is None else _batched(label, device))
        if not isinstance(found, Explanation):
            raise InputError(f"Explain needs an explainer for one target, got {sorted(found)}.")
        return found


class Explaind(MapTransform):
    """Dictionary version of :class:`Explain`: adds ``<prefix>_<key>`` for every key.

    Args:
        keys: the inputs of the network, in call order.
        explainer: what, how and over what extent, for a single target.
        network: the network.
        label_key: where the label is, for regions that need one.
        prefix: first part of the new keys.
        allow_missing_keys: leave out inputs that are not there.
    """

    def __init__(
        self,
        keys: KeysCollection,
        explainer: Explainer,
        network: nn.Module,
        *,
        label_key: str | None = None,
        prefix: str = "attribution",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.explain = Explain(explainer, network)
        self.label_key = label_key
        self.prefix = prefix

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the attributions of every key."""
        d = dict(data)
        inputs = {str(key): d[key] for key in self.key_iterator(d)}
        if self.label_key is not None and self.label_key not in d:
            raise KeyError(
                f"Explaind(label_key={self.label_key!r}) is missing in the data, which has {sorted(map(str, d))}."
            )
        label = d[self.label_key] if self.label_key is not None else None
        return d | {f"{self.prefix}_{name}": values for name, values in self.explain(inputs, label).items()}


class UnsavedMapWarning(UserWarning):
    """A map was made that no transform saves."""


class FlattenAttributionsd(FlattenSubKeysd):
    """Lift the maps that ``AttributionHandler`` put under one key to the top: ``attribution_image``, ….

    Cases that were not explained pass unchanged, so that the transforms that follow need ``allow_missing_keys=True``.

    Args:
        keys: the key of ``AttributionHandler``, which is also the first part of the new keys.
        saved: the new keys that transforms after this one save; maps of images under other ones are warned of, once,
            since nothing else would tell that they stay unsaved. None: nobody is to save any.
    """

    def __init__(self, keys: str = "attribution", saved: KeysCollection | None = None) -> None:
        super().__init__(keys, prefix=keys)
        self.allow_missing_keys = True
        self.saved = None if saved is None else {str(key) for key in ensure_tuple(saved)}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the maps at the top, without those that are all NaN: cases not explained."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = {name: values for name, values in d[key].items() if not torch.isnan(values).all()}
            self._warn_of_unsaved({f"{key}_{name}" for name, values in d[key].items() if values.ndim > 1})
        return dict(super().__call__(d))  # type: ignore[no-untyped-call]

    def _warn_of_unsaved(self, found: set[str]) -> None:
        if self.saved is None or not (unsaved := sorted(found - self.saved)):
            return
        self.saved |= found
        warnings.warn(
            f"Nothing saves the maps {', '.join(unsaved)}: of several explainers, targets or inputs each map has a key "
            f"of its own. Give each an Invertd and a SaveImaged after {type(self).__name__}, and name it in `saved`.",
            UnsavedMapWarning,
            stacklevel=2,
        )


class AtomicNibabelWriter(NibabelWriter):
    """``NibabelWriter`` that leaves a whole file or none: for ``SaveImaged(writer=AtomicNibabelWriter)``.

    Where the data lie as they did in the file they come from, they keep its place as it was written there: sform and
    qform with their codes, and units. Elsewhere the codes are those of the file, or 1 where it had none.

    ``SaveImaged`` turns every error of a writer into one about writers that are not installed; so that path and cure
    are seen, they are logged as well.

    Raises:
        OSError: naming the file and what to do, if it could not be written.
        InputError: if the affine gives voxels no place in space.
    """

    def __init__(self, output_dtype: DtypeLike = np.float32, **kwargs: Any) -> None:
        super().__init__(output_dtype=output_dtype, **kwargs)
        self._header: Mapping[Any, Any] = {}

    def set_metadata(
        self, meta_dict: Mapping[Any, Any] | None, resample: bool = True, **options: Any
    ) -> None:
        """Keep affine and header of the file that the data come from, and resample if that is asked for."""
        self._header = dict(meta_dict or {})
        if resample:
            super().set_metadata(meta_dict, resample, **options)
        else:  # MONAI resamples to the same place, and fails where an image in 2D has one channel
            affine = self.get_meta_info(meta_dict)[1]
            self.affine = np.eye(4) if affine is None else np.asarray(affine)

    def write(self, filename: PathLike, verbose: bool = False, **obj_kwargs: Any) -> None:
        """Write to a temporary file beside the target, then move it into place."""
        path = Path(filename)
        try:
            self._require_place(path)
            self._write_whole(path, **obj_kwargs)
        except (OSError, InputError) as error:
            logger.error("%s", error)
            raise

    def _require_place(self, path: Path) -> None:
        affine = None if self.affine is None else torch.as_tensor(self.affine)
        if affine is not None and not is_place(affine):
            raise InputError(
                f"{path} is not written: its affine is singular or not finite, {affine.tolist()}. Mend the header "
                "(spacing and directions) of the scan."
            )

    def _write_whole(self, path: Path, **options: Any) -> None:
        image = self.create_backend_obj(self.data_obj, affine=self.affine, dtype=self.output_dtype, **options)
        _place(image, self._header)
        try:
            with writing_whole(path) as partial:
                nibabel.save(image, partial)
        except OSError as error:
            cure = _CURES.get(error.errno or 0, "check that the folder exists and may be written to")
            raise OSError(
                error.errno, f"{path} is not written ({error.strerror or error}): {cure}, then run again"
            ) from error


def _place(image: nibabel.Nifti1Image, source: Mapping[Any, Any]) -> None:
    """Write into a header where its voxels lie, as the header that they come from did."""
    affine = np.array(image.affine)
    codes = {name: int(source[name]) for name in ("sform_code", "qform_code") if name in source}
    image.set_sform(affine, codes.get("sform_code") or 1)
    image.set_qform(affine, codes.get("qform_code") or 1)
    if len(codes) < 2:
        return
    copy = image.header.copy()
    for name in _PLACE:
        copy[name] = np.asarray(source[name])
    copy["pixdim"][:4] = np.asarray(source["pixdim"])[:4]
    if np.allclose(copy.get_best_affine(), affine, atol=1e-4):
        for name in (*_PLACE, "pixdim"):
            image.header[name] = copy[name]


def _batched(x: Tensor, device: torch.device) -> Tensor:
    if isinstance(x, MetaTensor):
        return MetaTensor(x.as_tensor()[None].to(device)).copy_meta_from(x, copy_attr=True)
    return torch.as_tensor(x)[None].to(device)
