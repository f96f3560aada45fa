"""What kernels cost on a device: measurements, what they say of other sizes, and their file."""

from morphgraph.device.kernels import Kernel
from morphgraph.device.predictor import Predictor
from morphgraph.device.profile import DeviceProfile, Measurement, load_profile

__all__ = ["DeviceProfile", "Kernel", "Measurement", "Predictor", "load_profile"]
