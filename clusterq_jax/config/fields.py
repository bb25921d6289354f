"""Every field of a configuration: its default, what it accepts, its meaning.

The defaults are the short recipe. Users see the fields as an
`ml_collections.ConfigDict` (`presets.default_config`) and set them with
`--config.section.field=value`. The code sees them as the frozen `Config`, once
`validation.resolve` has checked the values and filled in what is None.
"""

import dataclasses
from typing import Any, NamedTuple

from clusterq_jax.quant import numerics

_INT32 = 2**31


class Bounds(NamedTuple):
  """The smallest and the largest accepted number.

  Attributes:
    low: smallest.
    high: largest; where `below`, the number must be smaller than it.
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


class Meaning(NamedTuple):
  """What is known of a field beside its type and default.

  Attributes:
    doc: one line for users.
    bounds: of the number, or of each number of a tuple.
    choices: accepted strings; () for any.
    length: how many numbers a tuple has; None for any.
    recipe: with None as default, the number at budget 1; it scales with it.
  """

  doc: str
  bounds: Bounds | None = None
  choices: tuple[str, ...] = ()
  length: int | None = None
  recipe: int | None = None


def _field(default: Any, doc: str, bounds: Bounds | None = None, **more) -> Any:
  meaning = Meaning(doc, bounds, **more)
  return dataclasses.field(default=default, metadata={'meaning': meaning})


def _steps(recipe: int | None, doc: str, default: int | None = None) -> Any:
  return _field(default, doc, _STEPS, recipe=recipe)


_SHARE = Bounds(0, 1)
_STEPS = Bounds(0, 10**9)
_WEIGHT = Bounds(0, 10**6)
_RATE = Bounds(0, 10)
_PIXEL = Bounds(0, 65535)
_POSITIVE = Bounds(1e-6, 65535)
_BITS = Bounds(numerics.BITS[0], numerics.BITS[-1])


@dataclasses.dataclass(frozen=True)
class Teacher:
  """The float network that is quantized."""

  arch: str = _field('resnet20', 'Name of the network.')
  weights: str = _field('embedded', "Weights file, or 'embedded'.")
  entry: str = _field(
    '', "Which of a file's networks; '' takes the only one that fits."
  )
  num_classes: int | None = _field(
    None, 'Number of classes; None: as in the weights.', Bounds(2, 10**6)
  )
  image_size: tuple[int, ...] | None = _field(
    None,
    "Height and width of the input; None: as in the weights file's metadata.",
    Bounds(1, 2**15 - 1),
    length=2,
  )
  mean: tuple[float, ...] | None = _field(
    None, 'Mean per channel that the input is normalised with.', _PIXEL
  )
  std: tuple[float, ...] | None = _field(
    None, 'Standard deviation that the input is normalised with.', _POSITIVE
  )
  pixel_range: float | None = _field(
    None, 'Value of a white pixel before normalisation: 1 or 255.', _POSITIVE
  )
  channel_order: str | None = _field(None, "'rgb', 'bgr' or 'grey'.")


@dataclasses.dataclass(frozen=True)
class Quant:
  """Bit widths, and where and how the student is quantized."""

  weight_bits: int = _field(4, 'Bits of weights.', _BITS)
  activation_bits: int = _field(4, 'Bits of activations.', _BITS)
  first_weight_bits: int = _field(
    None, "Bits of the first layer's weights; None: weight_bits.", _BITS
  )
  last_weight_bits: int = _field(
    None, "Bits of the last layer's weights; None: weight_bits.", _BITS
  )
  placement: str = _field(
    'integer',
    "'integer': every layer output is quantized. 'paper': residual adds stay "
    'in float; such a student cannot be exported.',
    choices=('paper', 'integer'),
  )
  ranges: str = _field(
    'learned',
    "'learned': steps start at the MSE-optimal clip and are learned; weights "
    'are rounded to keep layer outputs, BatchNorms corrected. '
    "'minmax': ranges follow the largest magnitudes.",
    choices=('minmax', 'learned'),
  )
  headroom: float = _field(
    None,
    'Share by which activation ranges of the last stage are widened after '
    'training; None: 0 at 2 activation bits, 0.1 at 3, 0.2 from 4 on.',
    _SHARE,
  )


@dataclasses.dataclass(frozen=True)
class Generator:
  """The conditional generator of synthetic images."""

  latent_dim: int = _field(100, 'Length of the noise vector.', Bounds(1, 2**16))
  channels: tuple[int, ...] = _field(
    (128, 64, 32),
    'Channels per resolution, from the lowest; each doubles the one before.',
    Bounds(1, 2**14),
  )
  conditional: bool = _field(True, 'Whether BatchNorm gains depend on class.')
  prototypes: int = _field(
    8,
    "Embeddings per class, concatenated to the noise; 0: the paper's product.",
    Bounds(0, 2**16),
  )
  lr: float = _field(5e-3, 'Learning rate (Adam).', _RATE)
  workdir: str = _field(
    '', "A finished run whose generator is taken; '': trains one."
  )


@dataclasses.dataclass(frozen=True)
class Student:
  """The student's optimiser."""

  optimizer: str = _field(
    'adam', "'adam', or the paper's 'sgd'.", choices=('sgd', 'adam')
  )
  lr: float = _field(6e-4, 'Learning rate of the parameters.', _RATE)
  quant_lr: float = _field(
    2e-3, 'Learning rate of log steps (learned ranges).', _RATE
  )


@dataclasses.dataclass(frozen=True)
class Loss:
  """Weights and choices of the losses; see docs/method.md."""

  statistics: float = _field(10.0, 'a1: BatchNorm statistics (eq. 9).', _WEIGHT)
  sfda: float = _field(0.9, 'a2: class statistics (eq. 4).', _WEIGHT)
  diversity: float = _field(0.6, 'a3: diversity (eq. 6).', _WEIGHT)
  noise: tuple[float, ...] = _field(
    (0.2, 0.2),
    'Standard deviation of the diversity noise on means and on deviations.',
    Bounds(0, 100),
    length=2,
  )
  relative: bool = _field(
    True, "Whether statistics are in units of the teacher's stored deviations."
  )
  class_reduction: str = _field(
    'mean', 'Over the classes of a batch.', choices=('sum', 'mean')
  )
  student_cross_entropy: float = _field(
    0.0, "Weight of the student's cross-entropy (eq. 12).", _WEIGHT
  )
  features: float = _field(
    100.0, 'Weight of feature distillation; not in the paper.', _WEIGHT
  )


@dataclasses.dataclass(frozen=True)
class Centroids:
  """Moving averages of class statistics."""

  decay: float = _field(
    0.2, 'beta of eq. 5: weight of the new statistics; 0 freezes.', _SHARE
  )
  first_layer: int | None = _field(
    None,
    'First BatchNorm with class terms; None: (L + 1) // 2 - 2 of L.',
    Bounds(0, 10**5),
  )
  images_per_class: int = _field(
    32, 'Images per class that initialise a centroid.', Bounds(1, 10**6)
  )


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How long each phase is."""

  batch_size: int = _field(64, 'Images per step.', Bounds(2, 10**6))
  warmup_steps: int = _steps(400, 'Generator steps on L1 (eq. 7).')
  generator_steps: int = _steps(800, 'Generator steps on L2 (eq. 10).')
  joint_steps: int = _steps(
    None, 'Steps of generator (L2) and student (L3) together.', default=0
  )
  student_steps: int = _steps(600, 'Student steps (L3) on the pool.')
  pool_batches: int = _field(
    None,
    "Batches of the generator's newest images in the pool.",
    Bounds(0, 10**6),
    recipe=200,
  )
  procedural_batches: int = _field(
    None,
    'Batches of procedural images. They join the pool and calibrate the '
    'quantizers. With 0, one generator batch calibrates.',
    Bounds(0, 10**6),
    recipe=128,
  )
  lr_decay: str = _field(
    'cosine', "'cosine', or the paper's 'step'.", choices=('step', 'cosine')
  )


@dataclasses.dataclass(frozen=True)
class Augment:
  """Changes to synthetic images before the networks see them."""

  probability: float = _field(
    0.0, 'Probability that a batch is cropped and flipped.', _SHARE
  )
  flip: bool = _field(True, 'Whether mirrored images keep their class.')
  mixup: float = _field(
    0.2, 'Share of images blended with another, in student steps.', _SHARE
  )
  adversarial: float = _field(
    None,
    'Maximum adversarial step, in normalised pixel units, applied to every '
    'other image in student steps; None: (8 - activation_bits) / 40.',
    Bounds(0, 10),
  )


@dataclasses.dataclass(frozen=True)
class Eval:
  """Labelled images that measure, and never train."""

  source: str = _field(
    'none',
    'Where the images come from.',
    choices=('none', 'fashion_mnist', 'npz', 'folder', 'tfds'),
  )
  path: str = _field('', 'File or folder, or name of a TFDS data set.')
  resize: int | None = _field(
    None,
    'Shorter side before the centre crop, in pixels; 0: none; None: as is '
    'usual for the network.',
    Bounds(0, 2**15),
  )
  network: str = _field(
    'student',
    'What --mode=evaluate measures.',
    choices=('student', 'teacher', 'integer'),
  )
  batch_size: int = _field(250, 'Images per call.', Bounds(1, 10**6))


@dataclasses.dataclass(frozen=True)
class Export:
  """The deployable files."""

  after_training: bool = _field(
    True, 'Whether a run with integer placement ends with WORKDIR/export.'
  )
  folder: str = _field(
    '', "A new folder for --mode=export; '': WORKDIR/export."
  )


@dataclasses.dataclass(frozen=True)
class Dryrun:
  """The TPU that --mode=dryrun compiles for."""

  topology: str = _field('v5e:16x16', 'KIND:AxB, such as v5e:16x16.')


@dataclasses.dataclass(frozen=True)
class Report:
  """What a run writes about itself."""

  log_every: int = _field(25, 'Steps between logged lines.', Bounds(1, 10**9))
  trace_steps: int = _field(
    0, 'Steps that are profiled into WORKDIR/trace, for XProf.', _STEPS
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that a run depends on."""

  seed: int = _field(0, 'Of all random numbers.', Bounds(-_INT32, _INT32 - 1))
  budget: float = _field(
    1.0,
    'Length of the run: scales the steps and the pool that are not set. 1 is '
    'the short recipe.',
    Bounds(1e-4, 1000),
  )
  checkpoint_every: int = _field(
    100, 'Steps between checkpoints.', Bounds(1, 10**9)
  )
  compute_dtype: str = _field(
    'float32',
    'What convolutions compute in; state and everything else are float32.',
    choices=('float32', 'bfloat16'),
  )
  teacher: Teacher = Teacher()
  quant: Quant = Quant()
  generator: Generator = Generator()
  student: Student = Student()
  loss: Loss = Loss()
  centroids: Centroids = Centroids()
  schedule: Schedule = Schedule()
  augment: Augment = Augment()
  eval: Eval = Eval()
  export: Export = Export()
  dryrun: Dryrun = Dryrun()
  report: Report = Report()


def meanings() -> dict[str, Meaning]:
  """Returns what is known of each field, by dotted name."""
  found = {}
  for outer in dataclasses.fields(Config):
    if dataclasses.is_dataclass(outer.default):
      for inner in dataclasses.fields(outer.default):
        found[f'{outer.name}.{inner.name}'] = inner.metadata['meaning']
    else:
      found[outer.name] = outer.metadata['meaning']
  return found
