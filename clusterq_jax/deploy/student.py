"""Saves and loads a finished student as one safetensors file.

The tensors are parameters, BatchNorm statistics and quantizer steps. The header
holds graph, bit widths and preprocessing. Inference needs nothing else.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clusterq_jax import precision
from clusterq_jax import weights as weights_lib
from clusterq_jax.deploy import fold, integer
from clusterq_jax.errors import InputError
from clusterq_jax.layers import fake_quant
from clusterq_jax.models import graph_file, registry
from clusterq_jax.models.graph import Graph, trace
from clusterq_jax.models.network import Network
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.quant import plan as plan_lib

FILE = 'student.safetensors'
FORMAT = 'clusterq-jax student 2'
_WITHOUT_GRAPH = 'clusterq-jax student 1'  # earlier versions wrote it


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['variables'],
  meta_fields=[
    'preprocessing',
    'bits',
    'class_names',
    'graph',
    'plan',
    '_network',
  ],
)
@dataclasses.dataclass(frozen=True)
class Student:
  """Quantized network, ready for inference; a pytree of its variables.

  Attributes:
    variables: {'params', 'batch_stats', 'quant'}.
    preprocessing: preprocessing that `logits` applies.
    bits: bit widths and placement.
    class_names: K names, or ().
    graph: graph of the architecture.
    plan: quantizers of the network.
  """

  variables: dict[str, Any]
  preprocessing: Preprocessing
  bits: plan_lib.Bits
  class_names: tuple[str, ...]
  graph: Graph
  plan: plan_lib.Plan
  _network: Any

  @precision.in_float32
  def logits(self, images: Any) -> jax.Array:
    """Computes the logits of images.

    Every batch size B compiles once. Inside your own `jit`, pass the student as
    an argument of the function. Otherwise the weights become constants of the
    program, and an ImageNet network takes minutes to compile.

    Args:
      images: uint8 [B, H, W, C] in RGB, as an array or a list of images.

    Returns:
      float32 logits [B, K].

    Raises:
      ValueError: the images have another shape or dtype.
    """
    expected = (
      f'expected uint8 [B, {", ".join(map(str, self.preprocessing.shape))}]'
    )
    if not isinstance(images, (jax.Array, jax.core.ShapedArray)):
      try:
        images = np.asarray(images)
      except ValueError as e:  # a ragged list
        raise ValueError(f'images: {e}; {expected}') from e
    if images.dtype != jnp.uint8 or images.shape[1:] != (
      self.preprocessing.shape
    ):
      raise ValueError(
        f'images are {images.dtype} {list(images.shape)}; {expected}'
      )
    return _logits(self, images)

  @precision.in_float32
  def integer(self) -> integer.IntegerNetwork:
    """Returns the network that an integer runtime executes.

    Raises:
      InputError: the student has `paper` placement, which leaves residual adds
        in float.
    """
    if self.bits.placement != 'integer':
      raise InputError(
        f'the student has config.quant.placement={self.bits.placement!r}, '
        "which leaves residual adds in float; expected 'integer': quantize "
        'again with --config.quant.placement=integer in another workdir'
      )
    return fold.fold(self.graph, self.plan, self.variables, self.preprocessing)


@jax.jit
def _logits(student: Student, images: jax.Array) -> jax.Array:
  x = student.preprocessing.normalize(images)
  return student._network.apply(student.variables, x)


def save(
  path: pathlib.Path,
  variables: Mapping[str, Any],
  graph: Graph,
  bits: plan_lib.Bits,
  learned: bool,
  preprocessing: Preprocessing,
  class_names: tuple[str, ...],
) -> None:
  """Writes a student to a safetensors file.

  Args:
    path: file to write or to replace.
    variables: {'params', 'batch_stats', 'quant'}.
    graph: the network.
    bits: bit widths and placement.
    learned: whether the quantizer ranges are learned.
    preprocessing: preprocessing of the network.
    class_names: K names, or ().
  """
  metadata = {
    'format': FORMAT,
    'graph': graph_file.to_json(graph),
    'bits': json.dumps(dataclasses.asdict(bits)),
    'learned': json.dumps(learned),
    'preprocessing': json.dumps(dataclasses.asdict(preprocessing)),
    'class_names': json.dumps(class_names),
  }
  weights_lib.write_safetensors(
    path, jax.tree.map(np.asarray, dict(variables)), metadata
  )


@precision.in_float32
def load(path: str | pathlib.Path) -> Student:
  """Loads a finished student.

  JAX does not work after a fork. Load the student in the process that uses it,
  and start other processes with multiprocessing's 'spawn' method.

  Args:
    path: a workdir or its file student.safetensors.

  Raises:
    InputError: there is no student, or the file is damaged or of another kind.
  """
  path = pathlib.Path(path)
  file = path / FILE if path.is_dir() else path
  if not file.exists():
    raise InputError(f'{path}: no finished student; expected {FILE}')
  tensors, metadata = weights_lib.read_tensors(file)
  if metadata.get('format') not in (FORMAT, _WITHOUT_GRAPH):
    raise InputError(
      f'{file}: found format {metadata.get("format")!r}, expected {FORMAT!r}'
    )
  try:
    student = _make(tensors, metadata)
    images = jax.ShapeDtypeStruct((1, *student.preprocessing.shape), np.uint8)
    jax.eval_shape(student.logits, images)
  except InputError as e:
    raise InputError(f'{file}: {e}') from e
  except Exception as e:  # a damaged header can raise anything
    reason = (str(e).strip() or repr(e)).splitlines()[0]
    raise InputError(
      f'{file}: damaged, or not a student ({type(e).__name__}: {reason})'
    ) from e
  return student


def _make(
  tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> Student:
  raw: dict[str, Any] = json.loads(metadata['preprocessing'])
  lists = ('image_size', 'mean', 'std')
  raw |= {key: tuple(raw[key]) for key in lists}
  preprocessing = Preprocessing(**raw)
  graph = _graph(metadata)
  if graph.image_shape not in (None, preprocessing.shape):
    raise InputError(
      f'image_size={preprocessing.image_size}; the graph takes images of '
      f'{graph.image_shape}'
    )
  bits = plan_lib.Bits(**json.loads(metadata['bits']))
  plan = plan_lib.make_plan(
    graph,
    bits,
    json.loads(metadata['learned']),
    preprocessing.limit,
  )
  variables = weights_lib.unflatten(tensors)
  for name, output in plan.outputs:
    if output.zero_point:
      middle = 2 ** (output.bits - 1)  # for files older than zero points
      zero = variables['quant'][name].setdefault('zero_point', middle)
      if not 0 <= zero < 2**output.bits or zero != np.rint(zero):
        raise InputError(
          f'quant.{name}.zero_point={zero}; expected an integer from 0 to '
          f'{2**output.bits - 1}'
        )
  return Student(
    variables=variables,
    preprocessing=preprocessing,
    bits=bits,
    class_names=tuple(json.loads(metadata['class_names'])),
    graph=graph,
    plan=plan,
    _network=Network(fake_quant.layer_set(plan), graph),
  )


def _graph(metadata: Mapping[str, str]) -> Graph:
  """Returns the graph of a student."""
  if metadata['format'] == FORMAT:
    return graph_file.from_json(metadata['graph'])
  options = json.loads(metadata['options'])
  return trace(registry.builder(metadata['arch'], **options))
