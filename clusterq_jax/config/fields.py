"""Every field of a configuration: its default, what it accepts, its meaning.

The defaults are the short recipe. Users see the fields as an
`ml_collections.ConfigDict` (`presets.default_config`) and set them with
`--config.section.field=value`. The code sees them as the frozen `Config`, once
`validation.resolve` has checked the values and filled in what is None.
"""

import dataclasses
import inspect
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


def _field(default: Any, bounds: Bounds | None = None, **more: Any) -> Any:
  """Declares a field; its meaning is in the class docstring."""
  return dataclasses.field(default=default, metadata={'bounds': bounds, **more})


_SHARE = Bounds(0, 1)
_STEPS = Bounds(0, 10**9)
_WEIGHT = Bounds(0, 10**6)
_RATE = Bounds(0, 10)
_PIXEL = Bounds(0, 65535)
_POSITIVE = Bounds(1e-6, 65535)
_BITS = Bounds(numerics.BITS[0], numerics.BITS[-1])


@dataclasses.dataclass(frozen=True)
class Teacher:
  """The float network that is quantized.

  Attributes:
    arch: Name of the network.
    weights: Weights file, or 'embedded'.
    entry: Which of a file's networks; '' takes the only one that fits.
    num_classes: Number of classes; None: as in the weights.
    image_size: Height and width of the input; None: as in the weights
      file's metadata.
    mean: Mean per channel that the input is normalised with.
    std: Standard deviation that the input is normalised with.
    pixel_range: Value of a white pixel before normalisation: 1 or 255.
    channel_order: 'rgb', 'bgr' or 'grey'.
  """

  arch: str = _field('resnet20')
  weights: str = _field('embedded')
  entry: str = _field('')
  num_classes: int | None = _field(None, Bounds(2, 10**6))
  image_size: tuple[int, ...] | None = _field(
    None, Bounds(1, 2**15 - 1), length=2
  )
  mean: tuple[float, ...] | None = _field(None, _PIXEL)
  std: tuple[float, ...] | None = _field(None, _POSITIVE)
  pixel_range: float | None = _field(None, _POSITIVE)
  channel_order: str | None = _field(None)


@dataclasses.dataclass(frozen=True)
class Quant:
  """Bit widths, and where and how the student is quantized.

  Attributes:
    weight_bits: Bits of weights.
    activation_bits: Bits of activations.
    first_weight_bits: Bits of the first layer's weights; None: weight_bits.
    last_weight_bits: Bits of the last layer's weights; None: weight_bits.
    placement: 'integer': every layer output is quantized. 'paper': residual
      adds stay in float; such a student cannot be exported.
    ranges: 'learned': steps start at the MSE-optimal clip and are learned;
      weights are rounded to keep layer outputs, BatchNorms corrected.
      'minmax': ranges follow the largest magnitudes.
    headroom: Share by which activation ranges of the last stage are widened
      after training; None: 0 at 2 activation bits, 0.1 at 3, 0.2 from 4 on.
  """

  weight_bits: int = _field(4, _BITS)
  activation_bits: int = _field(4, _BITS)
  first_weight_bits: int = _field(None, _BITS)
  last_weight_bits: int = _field(None, _BITS)
  placement: str = _field('integer', choices=('paper', 'integer'))
  ranges: str = _field('learned', choices=('minmax', 'learned'))
  headroom: float = _field(None, _SHARE)


@dataclasses.dataclass(frozen=True)
class Generator:
  """The conditional generator of synthetic images.

  Attributes:
    latent_dim: Length of the noise vector.
    channels: Channels per resolution, from the lowest; each doubles the one
      before.
    conditional: Whether BatchNorm gains depend on class.
    prototypes: Embeddings per class, concatenated to the noise; 0: the
      paper's product.
    lr: Learning rate (Adam).
    workdir: A finished run whose generator is taken; '': trains one.
  """

  latent_dim: int = _field(100, Bounds(1, 2**16))
  channels: tuple[int, ...] = _field((128, 64, 32), Bounds(1, 2**14))
  conditional: bool = _field(True)
  prototypes: int = _field(8, Bounds(0, 2**16))
  lr: float = _field(5e-3, _RATE)
  workdir: str = _field('')


@dataclasses.dataclass(frozen=True)
class Student:
  """The student's optimiser.

  Attributes:
    optimizer: 'adam', or the paper's 'sgd'.
    lr: Learning rate of the parameters.
    quant_lr: Learning rate of log steps (learned ranges).
  """

  optimizer: str = _field('adam', choices=('sgd', 'adam'))
  lr: float = _field(6e-4, _RATE)
  quant_lr: float = _field(2e-3, _RATE)


@dataclasses.dataclass(frozen=True)
class Loss:
  """Weights and choices of the losses; see docs/method.md.

  Attributes:
    statistics: a1: BatchNorm statistics (eq. 9).
    sfda: a2: class statistics (eq. 4).
    diversity: a3: diversity (eq. 6).
    noise: Standard deviation of the diversity noise on means and on
      deviations.
    relative: Whether statistics are in units of the teacher's stored
      deviations.
    class_reduction: Over the classes of a batch.
    student_cross_entropy: Weight of the student's cross-entropy (eq. 12).
    features: Weight of feature distillation; not in the paper.
  """

  statistics: float = _field(10.0, _WEIGHT)
  sfda: float = _field(0.9, _WEIGHT)
  diversity: float = _field(0.6, _WEIGHT)
  noise: tuple[float, ...] = _field((0.2, 0.2), Bounds(0, 100), length=2)
  relative: bool = _field(True)
  class_reduction: str = _field('mean', choices=('sum', 'mean'))
  student_cross_entropy: float = _field(0.0, _WEIGHT)
  features: float = _field(100.0, _WEIGHT)


@dataclasses.dataclass(frozen=True)
class Centroids:
  """Moving averages of class statistics.

  Attributes:
    decay: beta of eq. 5: weight of the new statistics; 0 freezes.
    first_layer: First BatchNorm with class terms; None: (L + 1) // 2 - 2 of
      L.
    images_per_class: Images per class that initialise a centroid.
  """

  decay: float = _field(0.2, _SHARE)
  first_layer: int | None = _field(None, Bounds(0, 10**5))
  images_per_class: int = _field(32, Bounds(1, 10**6))


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How long each phase is.

  Attributes:
    batch_size: Images per step.
    warmup_steps: Generator steps on L1 (eq. 7).
    generator_steps: Generator steps on L2 (eq. 10).
    joint_steps: Steps of generator (L2) and student (L3) together.
    student_steps: Student steps (L3) on the pool.
    pool_batches: Batches of the generator's newest images in the pool.
    procedural_batches: Batches of procedural images. They join the pool and
      calibrate the quantizers. With 0, one generator batch calibrates.
    lr_decay: 'cosine', or the paper's 'step'.
  """

  batch_size: int = _field(64, Bounds(2, 10**6))
  warmup_steps: int = _field(None, _STEPS, recipe=400)
  generator_steps: int = _field(None, _STEPS, recipe=800)
  joint_steps: int = _field(0, _STEPS)
  student_steps: int = _field(None, _STEPS, recipe=600)
  pool_batches: int = _field(None, _WEIGHT, recipe=200)
  procedural_batches: int = _field(None, _WEIGHT, recipe=128)
  lr_decay: str = _field('cosine', choices=('step', 'cosine'))


@dataclasses.dataclass(frozen=True)
class Augment:
  """Changes to synthetic images before the networks see them.

  Attributes:
    probability: Probability that a batch is cropped and flipped.
    flip: Whether mirrored images keep their class.
    mixup: Share of images blended with another, in student steps.
    adversarial: Maximum adversarial step, in normalised pixel units,
      applied to every other image in student steps; None: (8 -
      activation_bits) / 40.
  """

  probability: float = _field(0.0, _SHARE)
  flip: bool = _field(True)
  mixup: float = _field(0.2, _SHARE)
  adversarial: float = _field(None, _RATE)


@dataclasses.dataclass(frozen=True)
class Eval:
  """Labelled images that measure, and never train.

  Attributes:
    source: Where the images come from.
    path: File or folder, or name of a TFDS data set.
    resize: Shorter side before the centre crop, in pixels; 0: none; None:
      as is usual for the network.
    network: What --mode=evaluate measures.
    batch_size: Images per call.
  """

  source: str = _field(
    'none', choices=('none', 'fashion_mnist', 'npz', 'folder', 'tfds')
  )
  path: str = _field('')
  resize: int | None = _field(None, Bounds(0, 2**15))
  network: str = _field('student', choices=('student', 'teacher', 'integer'))
  batch_size: int = _field(250, Bounds(1, 10**6))


@dataclasses.dataclass(frozen=True)
class Export:
  """The deployable files.

  Attributes:
    after_training: Whether a run with integer placement ends with
      WORKDIR/export.
    folder: A new folder for --mode=export; '': WORKDIR/export.
  """

  after_training: bool = _field(True)
  folder: str = _field('')


@dataclasses.dataclass(frozen=True)
class Dryrun:
  """The TPU that --mode=dryrun compiles for.

  Attributes:
    topology: KIND:AxB, such as v5e:16x16.
  """

  topology: str = _field('v5e:16x16')


@dataclasses.dataclass(frozen=True)
class Report:
  """What a run writes about itself.

  Attributes:
    log_every: Steps between logged lines.
    trace_steps: Steps that are profiled into WORKDIR/trace, for XProf.
  """

  log_every: int = _field(25, Bounds(1, 10**9))
  trace_steps: int = _field(0, _STEPS)


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that a run depends on.

  Attributes:
    seed: Of all random numbers.
    budget: Length of the run: scales the steps and the pool that are not
      set. 1 is the short recipe.
    checkpoint_every: Steps between checkpoints.
    compute_dtype: What convolutions compute in; state and everything else
      are float32.
  """

  seed: int = _field(0, Bounds(-_INT32, _INT32 - 1))
  budget: float = _field(1.0, Bounds(1e-4, 1000))
  checkpoint_every: int = _field(100, Bounds(1, 10**9))
  compute_dtype: str = _field('float32', choices=('float32', 'bfloat16'))
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


def _documented(section: Any) -> dict[str, str]:
  """Returns the attributes of a section's docstring, by name."""
  _, _, listed = (inspect.getdoc(section) or '').partition('Attributes:\n')
  found: dict[str, str] = {}
  name = ''
  for line in listed.splitlines():
    if line.startswith('    '):  # continues the attribute before it
      found[name] += f' {line.strip()}'
    else:
      name, _, text = line.strip().partition(': ')
      found[name] = text
  return found


def meanings() -> dict[str, Meaning]:
  """Returns what is known of each field, by dotted name."""
  found = {}
  for outer in dataclasses.fields(Config):
    section: Any = outer.default
    inner = dataclasses.is_dataclass(section)
    docs = _documented(section if inner else Config)
    for field in dataclasses.fields(section) if inner else [outer]:
      name = f'{outer.name}.{field.name}' if inner else outer.name
      found[name] = Meaning(docs[field.name], **field.metadata)
  return found
