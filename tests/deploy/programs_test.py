"""Imported networks, quantized and exported: ONNX Runtime gives our logits."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from clusterq_jax import importing, sharding
from clusterq_jax.deploy import fold
from clusterq_jax.method import calibration, procedural
from clusterq_jax.method.generator import Generator
from clusterq_jax.method.networks import Networks
from clusterq_jax.models import network
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.quant import plan as plan_lib
from clusterq_jax.quant import quantizers

onnxruntime = pytest.importorskip('onnxruntime')
onnx_graph = pytest.importorskip('clusterq_jax.deploy.onnx_graph')

_FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'golden' / 'programs'
_NAMES = [
  name
  for name in sorted(json.loads((_FOLDER / 'logits.json').read_text()))
  if not name.startswith('release')
]


def _student(name, bits, learned):
  """Imports and calibrates on 8 procedural images; returns what a run has."""
  imported = importing.import_program(_FOLDER / f'{name}.pt2')
  graph = imported.graph
  h, w, c = graph.image_shape
  prep = Preprocessing((h, w), (0.5,) * c, (0.25,) * c)
  plan = plan_lib.make_plan(graph, bits, learned, prep.limit)
  networks = Networks(
    network.builder(graph),
    graph,
    plan,
    Generator(prep.shape, graph.nodes[-1].features),
    prep,
    8,
    sharding.make_mesh(8),
  )
  x = procedural.dead_leaves(jax.random.key(0), 8, prep.shape)
  calibrate = jax.jit(functools.partial(calibration.calibrate, networks))
  student = calibrate(imported.variables, x)
  student['params'] = quantizers.settle(plan, student)
  whole = {
    **jax.device_get(student),
    'batch_stats': imported.variables['batch_stats'],
  }
  return networks, whole, imported


# Learned ranges round weights and correct biases, which takes long to compile.
@pytest.mark.parametrize(
  ('name', 'learned'),
  [
    *(
      pytest.param(
        name, False, marks=() if name == 'vgg_bn' else pytest.mark.full
      )
      for name in _NAMES
    ),
    pytest.param('mobilenet_v3', True, marks=pytest.mark.full),
  ],
)
def test_integer_file_of_an_imported_network(name, learned):
  bits = plan_lib.Bits(8, 8, 8, 8, 'integer')
  networks, student, imported = _student(name, bits, learned)
  prep = networks.preprocessing
  folded = fold.fold(networks.graph, networks.plan, student, prep)
  student['params'] = fold.round_biases(folded, student)
  x = procedural.dead_leaves(jax.random.key(1), 8, prep.shape)
  images = np.asarray(prep.to_pixels(x))
  ours = np.asarray(jax.jit(folded.logits)(images))
  model = onnx_graph.integer_model(folded, {})
  options = onnxruntime.SessionOptions()
  options.add_session_config_entry('session.x64quantprecision', '1')
  session = onnxruntime.InferenceSession(
    model.SerializeToString(), options, providers=['CPUExecutionProvider']
  )
  (theirs,) = session.run(None, {'images': images})
  np.testing.assert_array_equal(ours, theirs)
  assert np.ptp(ours, 0).max() > 0
  # The student that the file was folded from. Where a value lies between two
  # codes, they may round differently, and a random network amplifies that.
  x = prep.normalize(images)
  fake = np.asarray(
    jax.jit(networks.student_logits)(
      {key: student[key] for key in ('params', 'quant')},
      {'batch_stats': student['batch_stats']},
      prep.normalize(images),
    )
  )
  assert np.median(np.abs(ours - fake)) < 0.02 * np.abs(fake).max()
  # And the float network; other logits would have a correlation of about 0.
  whole = importing.logits(imported, np.asarray(prep.normalize(images)))
  assert np.corrcoef(whole.ravel(), ours.ravel())[0, 1] > 0.7
