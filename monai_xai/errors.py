"""What can go wrong, as a tree.

.. code-block:: text

    XaiError
    ├── InputError (ValueError)               what was handed in cannot be explained as it is
    │   ├── EmptyRegionError                  no voxel to explain in one sample
    │   └── SettingsChangedError              a run is to be continued under other settings
    ├── UnsupportedNetworkError (ValueError)  the method is not defined on this network
    ├── UnsupportedInfererError (ValueError)  a setting of the inferer has no exact attribution
    ├── UnsupportedBundleError (ValueError)   a bundle has nothing that could be explained
    └── AttributionError (RuntimeError)       the method failed while it ran
        ├── CasesFailedError                  cases of a run are not explained; the others are complete
        ├── OtherProcessError                 one of the processes that share the work failed
        └── OutOfStepError                    processes that share the work are not at the same place of it
"""

from __future__ import annotations


class XaiError(Exception):
    """Base of all errors that monai_xai raises on purpose."""


class InputError(XaiError, ValueError):
    """An input, label, baseline or output that cannot be explained as it is; says what was expected and what came."""


class EmptyRegionError(InputError):
    """The region holds no voxel in one of the samples; names the sample."""


class SettingsChangedError(InputError):
    """A run is to be continued under other settings than it was begun with; names them."""


class UnsupportedNetworkError(XaiError, ValueError):
    """The method is not defined on this network; names the modules that stand in the way."""


class UnsupportedInfererError(XaiError, ValueError):
    """A setting of the inferer cannot be honored exactly; names the setting."""


class UnsupportedBundleError(XaiError, ValueError):
    """A bundle has nothing that could be explained, or only in part; says why, and what can be asked."""


class AttributionError(XaiError, RuntimeError):
    """The method failed while it ran; names method, window and shape, and keeps the cause."""


class CasesFailedError(AttributionError):
    """Cases of a run are not explained, all others are; names each with its cause."""


class OtherProcessError(AttributionError):
    """One of the processes that share the work failed; says which and why."""


class OutOfStepError(AttributionError):
    """Processes that share the work are not at the same place of it; nothing more can be right, and the run ends."""
