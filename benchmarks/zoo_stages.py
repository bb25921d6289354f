"""Takes one network of the zoo from torch to an integer file.

    python -m benchmarks.zoo_stages SOURCE:NAME SIDE LAST_STAGE REPORT

`benchmarks.zoo` starts it and reads REPORT; see `zoo.supervise`. The weights are
random but look trained: gains, biases and their signs differ, and BatchNorm
statistics are those of a few smooth images, so that activations keep their
scale. The student is calibrated on procedural images that nobody optimised.
"""

import contextlib
import gc
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks import integer_latency, runtimes, zoo
from clusterq_jax.deploy import fold, onnx_graph
from clusterq_jax.errors import InputError
from clusterq_jax.layers import fake_quant, float_layers
from clusterq_jax.method import procedural
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.ops.moments import batch_statistics
from clusterq_jax.quant import plan as plan_lib

CALIBRATION, CHECKED = 16, 8  # images
BITS = plan_lib.Bits(8, 8, 8, 8, 'integer')
_SMOOTH = 8  # images that give the BatchNorm statistics
_LATENCY_S, _ROUNDS = 15, 30
