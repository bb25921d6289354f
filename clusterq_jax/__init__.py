"""ClusterQ-JAX: data-free quantization of image classifiers.

from clusterq_jax import load_student, quantize
results = quantize(config, 'runs/mine')
student = load_student('runs/mine')
logits = student.logits(images)
"""

import os
import sys

# XLA reads this once, when JAX is imported, which is below. The command line
# keeps XLA's logs away, since it says itself that a compilation takes long.
# Whoever imports the package as a library decides alone.
if 'clusterq_jax.main' in sys.orig_argv:
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

from clusterq_jax.deploy.student import load as load_student  # noqa: E402
from clusterq_jax.modes.evaluate import evaluate  # noqa: E402
from clusterq_jax.modes.quantize import quantize  # noqa: E402

__all__ = ['evaluate', 'load_student', 'quantize']
