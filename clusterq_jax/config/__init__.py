"""The configuration: every field with its default, and what is refused.

A config file in `configs/` calls `defaults()`, changes what its experiment
changes, and returns it. The defaults are the paper's values (arXiv 2205.00179)
for CIFAR. It lives in the package so that `train.quantize` can be called as a
library, from any folder.
"""

import json
import math
from typing import Any, NamedTuple

import ml_collections
from ml_collections.config_dict import placeholder

from clusterq_jax.errors import InputError
from clusterq_jax.method import procedural
from clusterq_jax.models import registry
from clusterq_jax.quant import numerics

# Sections that may differ between runs of one workdir.
FREE_SECTIONS = ('dryrun', 'eval', 'export', 'report')

_CHOICES = {
  'compute_dtype': ('float32', 'bfloat16'),
  'quant.placement': ('paper', 'integer'),
  'quant.ranges': ('minmax', 'learned'),
  'student.optimizer': ('sgd', 'adam'),
  'loss.class_reduction': ('sum', 'mean'),
  'loss.relative': ('none', 'noise', 'all'),
  'schedule.lr_decay': ('step', 'cosine'),
  'eval.source': ('none', 'fashion_mnist', 'npz', 'folder', 'tfds'),
  'eval.network': ('student', 'teacher', 'integer'),
}
# Tuples of sizes; the others are of numbers of any kind.
_SIZES = ('teacher.image_size', 'generator.channels', 'schedule.lr_boundaries')


class _Bounds(NamedTuple):
  """Smallest and largest value of a number, or of each of several.

  Attributes:
    low: smallest.
    high: largest, or, where `below`, what it stays below.
    below: see `high`.
  """

  low: float
  high: float
  below: bool = False

  def __contains__(self, value: object) -> bool:
    assert isinstance(value, (int, float))
    return self.low <= value <= self.high and not (
      self.below and value == self.high
    )

  def __str__(self) -> str:
    return f'{self.low:,} to {"below " * self.below}{self.high:,}'


_SHARE = _Bounds(0, 1)
_STEPS = _Bounds(0, 10**9)
_WEIGHT = _Bounds(0, 10**6)
_BITS = _Bounds(numerics.BITS[0], numerics.BITS[-1])
# Every number has its own: beyond them nothing useful can be meant.
_BOUNDS = {
  'quant.weight_bits': _BITS,
  'quant.activation_bits': _BITS,
  'quant.first_weight_bits': _BITS,
  'quant.last_weight_bits': _BITS,
  'quant.headroom': _SHARE,
  'seed': _Bounds(-(2**31), 2**31 - 1),
  'checkpoint_every': _Bounds(1, 10**9),
  'teacher.num_classes': _Bounds(2, 10**6),
  'teacher.image_size': _Bounds(1, 2**15 - 1),
  'teacher.mean': _Bounds(0, 65535),
  'teacher.std': _Bounds(1e-6, 65535),
  'teacher.pixel_range': _Bounds(1e-6, 65535),
  'generator.latent_dim': _Bounds(1, 2**16),
  'generator.channels': _Bounds(1, 2**14),
  'generator.prototypes': _Bounds(0, 2**16),
  'generator.lr': _Bounds(0, 10),
  'generator.betas': _Bounds(0, 1, below=True),
  'student.lr': _Bounds(0, 10),
  'student.momentum': _Bounds(0, 1, below=True),
  'student.weight_decay': _SHARE,
  'student.quant_lr': _Bounds(0, 10),
  'loss.statistics': _WEIGHT,
  'loss.sfda': _WEIGHT,
  'loss.diversity': _WEIGHT,
  'loss.noise': _Bounds(0, 100),
  'loss.student_cross_entropy': _WEIGHT,
  'loss.distillation': _WEIGHT,
  'loss.features': _WEIGHT,
  'centroids.decay': _SHARE,
  'centroids.first_layer': _Bounds(0, 10**5),
  'centroids.images_per_class': _Bounds(1, 10**6),
  'schedule.batch_size': _Bounds(2, 10**6),
  'schedule.warmup_steps': _STEPS,
  'schedule.generator_steps': _STEPS,
  'schedule.joint_steps': _STEPS,
  'schedule.student_steps': _STEPS,
  'schedule.pool_batches': _Bounds(0, 10**6),
  'schedule.procedural_batches': _Bounds(0, 10**6),
  'schedule.lr_boundaries': _Bounds(1, 10**9),
  'schedule.lr_factor': _SHARE,
  'schedule.range_steps': _STEPS,
  'augment.probability': _SHARE,
  'augment.mixup': _SHARE,
  'augment.adversarial': _Bounds(0, 10),
  'eval.resize': _Bounds(0, 2**15),
  'eval.batch_size': _Bounds(1, 10**6),
  'eval.synthetic_images': _Bounds(2000, 10**9),
  'report.log_every': _Bounds(1, 10**9),
  'report.trace_steps': _STEPS,
}
# How many numbers, where that is fixed.
_LENGTHS = {'loss.noise': 2, 'generator.betas': 2, 'teacher.image_size': 2}


def defaults() -> ml_collections.ConfigDict:
  """Every field, with the paper's CIFAR values where the paper has one."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.checkpoint_every = 1000  # steps
  # Of convolutions; all else, and the state, is float32.
  config.compute_dtype = 'float32'

  config.teacher = teacher = ml_collections.ConfigDict()
  teacher.arch = 'resnet20'
  teacher.weights = 'embedded'
  teacher.entry = ''  # of a file with several networks; '': what fits
  teacher.num_classes = placeholder(int)  # None: as in the weights
  # What the weights expect as input; None: as the file's metadata say.
  teacher.image_size = placeholder(tuple)
  teacher.mean = placeholder(tuple)
  teacher.std = placeholder(tuple)
  teacher.pixel_range = placeholder(float)
  teacher.channel_order = placeholder(str)

  config.quant = quant = ml_collections.ConfigDict()
  quant.weight_bits = 4
  quant.activation_bits = 4
  quant.first_weight_bits = placeholder(int)  # None: weight_bits
  quant.last_weight_bits = placeholder(int)
  quant.placement = 'paper'
  # Or 'learned': steps from the MSE-optimal clip, weights rounded to keep the
  # layers' outputs, and BatchNorms corrected for what this does to their
  # inputs, before the student's first step.
  quant.ranges = 'minmax'
  # Share by which ranges of activations in the last stage become wider once the
  # student is done; see `fake_quant.widen`.
  quant.headroom = 0.0

  config.generator = generator = ml_collections.ConfigDict()
  generator.latent_dim = 100
  generator.channels = (128, 128, 64)
  generator.conditional = False  # class-conditional BatchNorm; ImageNet
  generator.prototypes = 0  # embeddings per class beside z; not in the paper
  generator.lr = 1e-3
  generator.betas = (0.5, 0.999)
  generator.workdir = ''  # of a run whose generator to take, see `reuse`

  config.student = student = ml_collections.ConfigDict()
  student.optimizer = 'sgd'
  student.lr = 1e-4
  student.momentum = 0.9  # Nesterov, sgd only
  student.weight_decay = 1e-4
  student.quant_lr = 1e-3  # of log steps, learned ranges only

  config.loss = loss = ml_collections.ConfigDict()
  loss.statistics = 0.1  # a1
  loss.sfda = 0.9  # a2
  loss.diversity = 0.6  # a3
  loss.noise = (0.5, 1.0)  # lambda_mu, lambda_sigma
  # What is relative to the stored std of each channel: the noise of the
  # diversity term, or all statistics, the noise on them too.
  loss.relative = 'none'
  loss.class_reduction = 'sum'  # over classes
  loss.student_cross_entropy = 1.0
  loss.distillation = 1.0  # gamma
  loss.features = 0.0  # distillation of features; not in the paper

  config.centroids = centroids = ml_collections.ConfigDict()
  # beta: weight of the new statistics; 0: centroids stay as initialised.
  centroids.decay = 0.2
  centroids.first_layer = placeholder(int)  # None: (L + 1) // 2 - 2
  centroids.images_per_class = 32  # for their initialisation, on average

  config.schedule = schedule = ml_collections.ConfigDict()
  schedule.batch_size = 200
  schedule.warmup_steps = 10_000  # generator, L1
  schedule.generator_steps = 0  # generator, L2
  schedule.joint_steps = 70_000  # generator, L2, and student, L3
  schedule.student_steps = 0  # student, L3, on the pool
  schedule.pool_batches = 0  # of the generator's newest images
  # Of procedural images, which join the pool, and which quantizers are set
  # from; without, that is a batch of the generator's. Not in the paper.
  schedule.procedural_batches = 0
  schedule.lr_decay = 'step'
  schedule.lr_boundaries = (20_000, 40_000, 60_000)
  schedule.lr_factor = 0.1
  schedule.range_steps = 800  # student steps in which ranges adapt (minmax)

  config.augment = augment = ml_collections.ConfigDict()
  augment.probability = 0.5  # per batch
  augment.flip = True
  # In student steps; not in the paper. mixup: share of blended images;
  # adversarial: how far, of a normalised pixel, every other image is moved at
  # most to where student and teacher differ more.
  augment.mixup = 0.0
  augment.adversarial = 0.0

  config.eval = evaluation = ml_collections.ConfigDict()
  evaluation.source = 'none'
  evaluation.path = ''
  # See `data.load`. None: as `registry.Architecture.crop` has it.
  evaluation.resize = placeholder(int)
  evaluation.network = 'student'
  evaluation.batch_size = 250
  evaluation.synthetic_images = 2048

  config.export = export = ml_collections.ConfigDict()
  export.folder = ''  # a new one; '': WORKDIR/export

  config.dryrun = dryrun = ml_collections.ConfigDict()
  dryrun.topology = 'v5e:16x16'  # KIND:AxB, see `dryrun.CHIPS`

  config.report = report = ml_collections.ConfigDict()
  report.log_every = 100  # steps
  report.trace_steps = 0  # profiled, into WORKDIR/trace, for XProf
  return config.lock()


def imagenet() -> ml_collections.ConfigDict:
  """The paper's values for ImageNet."""
  config = defaults()
  config.teacher.num_classes = 1000
  config.generator.conditional = True
  config.student.lr = 1e-6
  config.schedule.batch_size = 16
  return config


def fast(scale: float = 1.0) -> ml_collections.ConfigDict:
  """The short recipe: minutes on two CPU cores.

  Departs from the paper: a slim generator with prototypes of each class, which
  a class can also shape by gains of its own; statistics in units of the stored
  deviations; the student rests until the generator is done, then learns from
  its recent images, and from procedural ones that were moved towards the
  teacher's statistics, mixed with one another too and moved to where it errs;
  it starts from quantizer steps of the MSE-optimal clip, weights rounded to
  keep the layers' outputs, and BatchNorms corrected; Adam with a cosine;
  distillation of logits and features without cross-entropy; ranges of the last
  stage with headroom.

  Args:
    scale: of the steps of every phase and the images of the pool, for those
      with more or less time.
  """

  def scaled(count: int) -> int:
    return max(1, round(scale * count))

  config = defaults()
  config.checkpoint_every = 100
  config.quant.ranges = 'learned'
  # The fewer bits, the more a wider range costs: 0, 0.1, and 0.2 from 4 on.
  bits = config.quant.get_oneway_ref('activation_bits')
  config.quant.headroom = (bits - abs(bits - 4)).to_float() / 20
  config.generator.channels = (128, 64, 32)
  config.generator.lr = 5e-3
  config.generator.conditional = True
  config.generator.prototypes = 8
  config.student.optimizer = 'adam'
  config.student.lr = 6e-4
  config.student.quant_lr = 2e-3
  config.augment.probability = 0.0
  config.augment.mixup = 0.2
  # The fewer bits, the more a student can err: 0.1 for 4, and none for 8.
  config.augment.adversarial = (8 - bits).to_float() / 40
  config.loss.statistics = 10.0
  config.loss.student_cross_entropy = 0.0
  config.loss.features = 100.0
  config.loss.noise = (0.2, 0.2)
  config.loss.relative = 'all'
  config.loss.class_reduction = 'mean'
  config.schedule.batch_size = 64
  config.schedule.warmup_steps = scaled(400)
  config.schedule.generator_steps = scaled(800)
  config.schedule.joint_steps = 0
  config.schedule.student_steps = scaled(600)
  config.schedule.pool_batches = scaled(200)
  config.schedule.procedural_batches = scaled(128)
  config.schedule.lr_decay = 'cosine'
  config.report.log_every = 25
  return config


def _flat(tree: dict, prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat.update(_flat(value, f'{prefix}{key}.'))
    else:
      flat[prefix + key] = value
  return flat


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Dotted field name to value."""
  return _flat(config.to_dict())


def validate(config: ml_collections.ConfigDict) -> None:
  """Refuses, with reasons, what no run could use.

  Raises:
    InputError: naming the field, the value found and what was expected.
  """
  expected = defaults()
  known, values = flatten(expected), flatten(config)
  for field in values.keys() ^ known.keys():
    problem = 'unknown' if field in values else 'missing'
    raise InputError(f'config.{field}: {problem} field')
  for field, value in values.items():
    section, _, name = field.rpartition('.')
    fields = expected[section] if section else expected
    _check_type(field, value, fields.get_type(name), known[field] is None)
  try:
    registry.architecture(values['teacher.arch'])
  except InputError as e:
    raise InputError(f'config.teacher.arch: {e}') from e
  for field, choices in _CHOICES.items():
    if values[field] not in choices:
      raise InputError(
        f'config.{field}={values[field]!r}: expected one of '
        f'{", ".join(choices)}'
      )
  _validate_numbers(values)
  _validate_schedule(config.schedule)
  if config.generator.workdir and config.schedule.joint_steps:
    raise InputError(
      f'config.generator.workdir={config.generator.workdir!r}: joint steps '
      'move generator and student together; expected '
      'config.schedule.joint_steps=0'
    )


def _validate_numbers(values: dict[str, Any]) -> None:
  """Refuses numbers out of bounds; bits first, since some follow from them."""
  for field, bounds in _BOUNDS.items():
    value = values[field]
    if value is None:
      continue
    several = value if isinstance(value, (tuple, list)) else (value,)
    if not all(number in bounds for number in several):
      raise InputError(f'config.{field}={value!r}: expected {bounds}')
    length = _LENGTHS.get(field, len(several))
    if len(several) != length:
      raise InputError(f'config.{field}={value!r}: expected {length} numbers')
  channels = values['generator.channels']
  if len(channels) < 2:
    raise InputError(
      f'config.generator.channels={channels!r}: expected 2 or more numbers'
    )
  boundaries = values['schedule.lr_boundaries']
  if list(boundaries) != sorted(set(boundaries)):
    raise InputError(
      f'config.schedule.lr_boundaries={boundaries!r}: expected ascending steps'
    )


def _is_number(value: Any) -> bool:
  """A finite one, that fits into 32 bits where it is whole."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  if isinstance(value, int):
    return -(2**31) <= value < 2**31
  return math.isfinite(value)


def _check_type(field: str, value: Any, kind: type, optional: bool) -> None:
  """Refuses a value of another type than the field has."""
  if value is None and optional:
    return
  expected, fits = {
    bool: ('True or False', isinstance(value, bool)),
    int: (
      'a whole number of 32 bits',
      _is_number(value) and isinstance(value, int),
    ),
    float: ('a finite number', _is_number(value)),
    str: ('a text', isinstance(value, str) and '\0' not in value),
    tuple: (
      'whole numbers above 0' if field in _SIZES else 'finite numbers',
      isinstance(value, (tuple, list))
      and all(map(_is_number, value))
      and (
        field not in _SIZES or all(isinstance(n, int) and n > 0 for n in value)
      ),
    ),
  }[kind]
  if not fits:
    raise InputError(f'config.{field}={value!r}: expected {expected}')


def _validate_schedule(schedule: ml_collections.ConfigDict) -> None:
  filled = schedule.generator_steps + schedule.joint_steps
  if not schedule.joint_steps and not schedule.student_steps:
    raise InputError(
      'config.schedule.joint_steps=0 and student_steps=0: the student would '
      'never train; expected one above 0'
    )
  if schedule.student_steps and not 0 < schedule.pool_batches <= filled:
    raise InputError(
      f'config.schedule.pool_batches={schedule.pool_batches}: student_steps '
      f'draw from it; expected 1 to generator_steps + joint_steps = {filled}'
    )


def phases(schedule: ml_collections.ConfigDict) -> dict[str, int]:
  """Steps of each phase of a run, in order."""
  return {
    'warm-up': schedule.warmup_steps,
    'generator': schedule.generator_steps,
    'procedural': schedule.procedural_batches * procedural.STEPS,
    'joint': schedule.joint_steps,
    'student': schedule.student_steps,
  }


def total_steps(schedule: ml_collections.ConfigDict) -> int:
  return sum(phases(schedule).values())


def to_json(config: ml_collections.ConfigDict) -> str:
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def differences(old: dict, new: ml_collections.ConfigDict) -> list[str]:
  """Training fields in which a stored config differs: 'field: old -> new'."""
  # A field that came later had its default then.
  before = _flat(json.loads(to_json(defaults()))) | _flat(old)
  after = _flat(json.loads(to_json(new)))
  return [
    f'{field}: {before.get(field)!r} -> {after.get(field)!r}'
    for field in sorted(before.keys() | after.keys())
    if field.split('.')[0] not in FREE_SECTIONS
    and before.get(field) != after.get(field)
  ]
