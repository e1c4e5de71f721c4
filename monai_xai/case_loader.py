"""Chosen cases of a data loader, in order; one that cannot be loaded takes nothing from the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from monai.data import MetaTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from monai_xai.errors import InputError


@dataclass(frozen=True)
class NotLoaded:
    """Why the cases at some places of a data set are not loaded.

    Args:
        places: their places.
        cause: type and message of the first error in the chain.
    """

    places: tuple[int, ...]
    cause: str


class CaseLoader:
    """Yields batches of the cases at chosen places of a data loader's data set, once each and in that order.

    Args:
        loader: gives data set, batch size, collation and workers; its sampler is not used.
        on_failure: is told of cases that cannot be loaded, which are left out.

    Raises:
        InputError: if the data set cannot be asked for a place.
    """

    def __init__(self, loader: DataLoader[Any], on_failure: Callable[[NotLoaded], None]) -> None:
        if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
            raise InputError(
                f"A run that can be continued needs a data set with places, got {type(loader.dataset).__name__}: "
                "give a monai.data.Dataset of a list."
            )
        self.loader = loader
        self.on_failure = on_failure
        self.chosen: Sequence[int] = range(len(loader.dataset))
        self.places: tuple[int, ...] = ()
        """Places of the rows of the batch that was yielded last."""

    def __len__(self) -> int:
        """Return how many batches there are if all cases can be loaded."""
        return -(-len(self.chosen) // self._batch_size)

    def __iter__(self) -> Iterator[Any]:
        for found in self._batches():
            loaded, failures = found
            for failure in failures:
                self.on_failure(failure)
            if loaded is not None:
                self.places, batch = loaded
                yield batch

    @property
    def _batch_size(self) -> int:
        return self.loader.batch_size or 1

    def _batches(self) -> Iterator[Any]:
        given = self.loader
        workers: dict[str, Any] = (
            {
                "prefetch_factor": given.prefetch_factor,
                "multiprocessing_context": given.multiprocessing_context,
            }
            if given.num_workers
            else {}
        )
        return iter(
            DataLoader(
                _Guarded(given.dataset, self.chosen),
                batch_size=self._batch_size,
                shuffle=False,
                num_workers=given.num_workers,
                collate_fn=_Collation(given.collate_fn),
                pin_memory=given.pin_memory,
                worker_init_fn=given.worker_init_fn,
                timeout=given.timeout,
                **workers,
            )
        )


class _Guarded(Dataset[Any]):
    """A data set that gives places with its items, and causes instead of errors."""

    def __init__(self, dataset: Dataset[Any], chosen: Sequence[int]) -> None:
        self.dataset = dataset
        self.chosen = tuple(chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        place = self.chosen[number]
        try:
            return place, self.dataset[place]
        except Exception as error:
            return place, NotLoaded((place,), cause_of(error))


class _Collation:
    """Collates what was loaded, and hands on why the rest was not."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(
        self, items: list[tuple[int, Any]]
    ) -> tuple[tuple[tuple[int, ...], Any] | None, list[NotLoaded]]:
        failures = [item for _, item in items if isinstance(item, NotLoaded)]
        rows = [(place, item) for place, item in items if not isinstance(item, NotLoaded)]
        places = tuple(place for place, item in rows for _ in (item if isinstance(item, list) else [item]))
        if not rows:
            return None, failures
        try:
            return (places, self.collate([item for _, item in rows])), failures
        except Exception as error:
            return None, [*failures, NotLoaded(places, cause_of(error))]


def items_of(dataset: Any) -> Sequence[Any] | None:
    """Return what a data set says of its cases before they are loaded; None if it says nothing."""
    if isinstance(dataset, Subset):
        items = items_of(dataset.dataset)
        return None if items is None else [items[index] for index in dataset.indices]
    items = getattr(dataset, "data", None)
    length = len(dataset)
    has_places = isinstance(items, Sequence) and not isinstance(items, str) and len(items) == length
    return items if has_places else None


def cause_of(error: BaseException) -> str:
    """Return type and message of the error that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(error).split())
    if isinstance(error, MemoryError) and not words:
        words = "what the header promises does not fit into memory; it may be damaged"
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def file_of(image: Any) -> str | None:
    """Return the file that an image was loaded from, or is to be."""
    if isinstance(image, MetaTensor):
        return file_of(image.meta.get("filename_or_obj"))
    if isinstance(image, list | tuple) and image:
        return file_of(image[0])
    return str(image) if isinstance(image, str) else None
