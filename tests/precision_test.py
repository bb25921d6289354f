"""Products of calibration and integer network are exact on accelerators.

The tests read the programs that JAX makes for other platforms.
"""

import concurrent.futures
import pathlib
import re
import types

import jax
import numpy as np
import pytest

from clusterq_jax import config as config_lib
from clusterq_jax import importing, sharding
from clusterq_jax.deploy import fold
from clusterq_jax.method import calibration
from clusterq_jax.method.generator import Generator
from clusterq_jax.method.networks import Networks
from clusterq_jax.models import network
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.quant import plan as plan_lib
from clusterq_jax.quant import quantizers
from clusterq_jax.runtime.session import Session

_ASSETS = pathlib.Path(__file__).parent / 'assets'
_PRODUCT = re.compile(r'stablehlo\.(dot_general|convolution)\b(.*)')


@pytest.fixture(params=['bfloat16', 'tensorfloat32'])
def rounding(request):
  """Asks JAX to round the factors of products, in all threads."""
  before = jax.config.jax_default_matmul_precision
  jax.config.update('jax_default_matmul_precision', request.param)
  yield
  jax.config.update('jax_default_matmul_precision', before)


def _products(function, *arguments, platform):
  """Returns (kind, rest of the line) of the products of a program.

  A new thread makes the program, because JAX keeps settings by thread.
  """

  def lower():
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    text = pool.submit(lower).result()
  return [match.groups() for match in _PRODUCT.finditer(text)]


def _resnet(config):
  """Returns what the tests need of a ResNet-8."""
  config.quant.ranges = 'learned'
  config.quant.placement = 'integer'
  session = Session(config_lib.resolve(config))
  return types.SimpleNamespace(
    networks=session.steps.networks, variables=session.teacher.variables
  )


def _imported():
  """Returns the same of a network with depthwise and dense layers."""
  imported = importing.import_program(_ASSETS / 'se_network.pt2')
  h, w, c = imported.graph.image_shape
  prep = Preprocessing((h, w), (0.5,) * c, (0.25,) * c)
  bits = plan_lib.Bits(8, 8, 8, 8, 'integer')
  networks = Networks(
    network.builder(imported.graph),
    imported.graph,
    plan_lib.make_plan(imported.graph, bits, True, prep.limit),
    Generator(prep.shape, imported.graph.nodes[-1].features),
    prep,
    8,
    sharding.make_mesh(8),
  )
  return types.SimpleNamespace(networks=networks, variables=imported.variables)


@pytest.fixture(
  params=['resnet8', pytest.param('se_network', marks=pytest.mark.slow)]
)
def made(request, tiny_config):
  return _resnet(tiny_config) if request.param == 'resnet8' else _imported()


def _all_exact(products):
  return all(rest.count('HIGHEST') == 2 for _, rest in products)


def test_calibration(made, rounding):
  networks = made.networks
  x = jax.ShapeDtypeStruct((8, *networks.preprocessing.shape), np.float32)

  def calibrate(variables, x):
    return calibration.calibrate(networks, variables, x)

  found = _products(calibrate, made.variables, x, platform='cuda')
  assert {kind for kind, _ in found} == {'dot_general', 'convolution'}
  # Each layer of teacher and student, and the moments of its inputs.
  assert len(found) > 2 * len(networks.plan.weights)
  assert _all_exact(found)
  # Elsewhere JAX's setting holds, so the test could fail.
  found = _products(networks.teacher_logits, made.variables, x, platform='cuda')
  assert not any('HIGHEST' in rest for _, rest in found)


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_integer_network(made, rounding, platform):
  networks = made.networks
  params = made.variables['params']
  quant = quantizers.uncalibrated(networks.plan, params)
  student = {'params': params, 'quant': quant}
  whole = {**student, 'batch_stats': made.variables['batch_stats']}
  folded = fold.fold(
    networks.graph,
    networks.plan,
    jax.device_get(whole),
    networks.preprocessing,
  )
  images = jax.ShapeDtypeStruct((8, *networks.preprocessing.shape), np.uint8)
  found = _products(folded.logits, images, platform=platform)
  assert len(found) >= len(networks.plan.weights)
  assert _all_exact(found)
  # A GPU's library may choose an algorithm for convolutions that is not exact.
  kinds = {kind for kind, _ in found}
  assert ('convolution' in kinds) == (platform == 'tpu')
