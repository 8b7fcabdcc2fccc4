"""Static scales, centres and cache types of a model's layers, from samples of its Q, K and V.

``python -m fastattn calibrate`` writes a :class:`Calibration`, which :meth:`Calibration.apply` puts
into layers. Only :meth:`Calibration.apply` and dumps of Paddle need Paddle.
"""

from fastattn.calibrate.calibration import Calibration, LayerCalibration
from fastattn.calibrate.choose import calibrate_layer
from fastattn.calibrate.samples import LayerSamples, read_samples

__all__ = [
    "Calibration",
    "LayerCalibration",
    "LayerSamples",
    "calibrate_layer",
    "read_samples",
]
