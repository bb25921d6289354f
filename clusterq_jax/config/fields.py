"""Defines every config field: default, accepted values and meaning.

The defaults are the short recipe. Users see the fields as an
`ml_collections.ConfigDict` (`presets.default_config`) and set them with
`--config.section.field=value`. The code uses the frozen `Config`, which
`validation.resolve` makes: it checks the values and replaces each None that
follows from other fields. `validation.complete` replaces those that follow from
the network, by the rules in `derive.py`.

The attributes in the docstrings are the meanings that --mode=config prints.
"""

import dataclasses
from typing import Any

from clusterq_jax.config.meaning import Bounds, Meaning, documented, field
from clusterq_jax.quant import numerics

_INT32 = 2**31
_SHARE = Bounds(0, 1)
_STEPS = Bounds(0, 10**9)
_WEIGHT = Bounds(0, 10**6)
_RATE = Bounds(0, 10)
_PIXEL = Bounds(0, 65535)
_POSITIVE = Bounds(1e-6, 65535)
_BITS = Bounds(numerics.BITS[0], numerics.BITS[-1])


@dataclasses.dataclass(frozen=True)
class Teacher:
  """Float network to quantize.

  Attributes:
    arch: Name of the network; '': the weights file holds its graph.
    weights: Path of a weights file, or 'embedded' for the shipped one.
    entry: Key of the network in a file of several; '': the only one that fits.
    num_classes: Number of classes; None: as in the weights.
    image_size: Height and width of the input, in pixels; None: as in the
      metadata of the weights file.
    mean: Mean of each channel, subtracted from the input, in units of
      pixel_range.
    std: Standard deviation of each channel, which divides the input.
    pixel_range: Value of a white pixel before normalisation: 1 or 255.
    channel_order: Channels that the network expects: 'rgb', 'bgr' or 'grey'.
  """

  arch: str = field('resnet20')
  weights: str = field('embedded')
  entry: str = field('')
  num_classes: int | None = field(None, Bounds(2, 10**6))
  image_size: tuple[int, ...] | None = field(
    None, Bounds(1, 2**15 - 1), length=2
  )
  mean: tuple[float, ...] | None = field(None, _PIXEL)
  std: tuple[float, ...] | None = field(None, _POSITIVE)
  pixel_range: float | None = field(None, _POSITIVE)
  channel_order: str | None = field(None)


@dataclasses.dataclass(frozen=True)
class Quant:
  """Bit widths, placement and ranges of the student's quantizers.

  Attributes:
    weight_bits: Bits of weights.
    activation_bits: Bits of activations.
    first_weight_bits: Bits of the first layer's weights; None: weight_bits.
    last_weight_bits: Bits of the last layer's weights; None: weight_bits.
    placement: 'integer': every layer output is quantized. 'paper': residual
      adds stay in float; such a student cannot be exported.
    ranges: 'learned': quantizer steps start at the MSE-optimal clip and are
      trained; weights are rounded to preserve layer outputs (GPTQ), and
      BatchNorms are corrected. 'minmax': ranges follow the largest magnitudes.
    headroom: Share by which the activation ranges of the last stage are widened
      after training; None: 0 at 2 activation bits, 0.1 at 3, 0.2 at 4 and more.
  """

  weight_bits: int = field(4, _BITS)
  activation_bits: int = field(4, _BITS)
  first_weight_bits: int = field(None, _BITS)
  last_weight_bits: int = field(None, _BITS)
  placement: str = field('integer', choices=('paper', 'integer'))
  ranges: str = field('learned', choices=('minmax', 'learned'))
  headroom: float = field(None, _SHARE)


@dataclasses.dataclass(frozen=True)
class Generator:
  """Conditional generator of synthetic images.

  Attributes:
    latent_dim: Length of the noise vector.
    channels: Channels at each resolution, from the lowest. Each resolution has
      twice the height and width of the one before. None: from the network.
    conditional: Whether BatchNorm gains depend on the class.
    prototypes: Number of embeddings per class; one is concatenated to the
      noise. 0: the paper's product of embedding and noise.
    lr: Learning rate (Adam).
    workdir: Workdir of a finished run whose generator to use; '': train one.
  """

  latent_dim: int = field(100, Bounds(1, 2**16))
  channels: tuple[int, ...] = field(None, Bounds(1, 2**14))
  conditional: bool = field(True)
  prototypes: int = field(8, Bounds(0, 2**16))
  lr: float = field(5e-3, _RATE)
  workdir: str = field('')


@dataclasses.dataclass(frozen=True)
class Student:
  """Optimiser of the student.

  Attributes:
    optimizer: Optimiser: 'adam', or the paper's 'sgd'.
    lr: Learning rate of the parameters; None: from the network.
    quant_lr: Learning rate of the logarithms of quantizer steps (learned
      ranges); None: from the network.
  """

  optimizer: str = field('adam', choices=('sgd', 'adam'))
  lr: float = field(None, _RATE)
  quant_lr: float = field(None, _RATE)


@dataclasses.dataclass(frozen=True)
class Loss:
  """Weights and choices of the losses; see docs/method.md.

  Attributes:
    statistics: a1: BatchNorm statistics (eq. 9).
    sfda: a2: class statistics (eq. 4).
    diversity: a3: diversity (eq. 6).
    noise: Standard deviations of the diversity noise on class means and on
      class standard deviations.
    relative: Whether statistics are divided by the teacher's stored standard
      deviations.
    class_reduction: How the class terms are reduced over the classes of a
      batch.
    student_cross_entropy: Weight of the student's cross-entropy (eq. 12).
    features: Weight of feature distillation; not in the paper.
  """

  statistics: float = field(10.0, _WEIGHT)
  sfda: float = field(0.9, _WEIGHT)
  diversity: float = field(0.6, _WEIGHT)
  noise: tuple[float, ...] = field((0.2, 0.2), Bounds(0, 100), length=2)
  relative: bool = field(True)
  class_reduction: str = field('mean', choices=('sum', 'mean'))
  student_cross_entropy: float = field(0.0, _WEIGHT)
  features: float = field(100.0, _WEIGHT)


@dataclasses.dataclass(frozen=True)
class Centroids:
  """Moving averages of class statistics.

  Attributes:
    decay: beta of eq. 5: weight of the new statistics; 0 freezes the centroids.
    first_layer: Index of the first BatchNorm with class terms; None: (L + 1) //
      2 - 2 of L BatchNorms.
    images_per_class: Images per class that initialise a centroid; None: from
      the network.
  """

  decay: float = field(0.2, _SHARE)
  first_layer: int | None = field(None, Bounds(0, 10**5))
  images_per_class: int = field(None, Bounds(1, 10**6))


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Lengths of the phases, batch and pool.

  Attributes:
    batch_size: Images per step; None: from the network.
    warmup_steps: Generator steps on L1 (eq. 7).
    generator_steps: Generator steps on L2 (eq. 10).
    joint_steps: Steps of generator (L2) and student (L3) together.
    student_steps: Student steps (L3) on the pool.
    pool_batches: Number of batches of the generator's newest images in the
      pool.
    procedural_batches: Number of batches of procedural images. They join the
      pool and calibrate the quantizers. With 0, one generator batch calibrates.
    lr_decay: Decay of the learning rates: 'cosine', or the paper's 'step'.
  """

  batch_size: int = field(None, Bounds(2, 10**6))
  warmup_steps: int = field(None, _STEPS, recipe=400)
  generator_steps: int = field(None, _STEPS, recipe=800)
  joint_steps: int = field(0, _STEPS)
  student_steps: int = field(None, _STEPS, recipe=600)
  pool_batches: int = field(None, _WEIGHT, recipe=200)
  procedural_batches: int = field(None, _WEIGHT, recipe=128)
  lr_decay: str = field('cosine', choices=('step', 'cosine'))


@dataclasses.dataclass(frozen=True)
class Augment:
  """Changes to synthetic images before the networks see them.

  Attributes:
    probability: Probability that a batch is cropped and flipped.
    flip: Whether mirrored images keep their class.
    mixup: Share of images that are blended with another image in student steps.
    adversarial: Maximum adversarial step, in normalised pixel units. A quarter
      of the images of a student step took it after the step before. None: (8 -
      activation_bits) / 40.
  """

  probability: float = field(0.0, _SHARE)
  flip: bool = field(True)
  mixup: float = field(0.2, _SHARE)
  adversarial: float = field(None, _RATE)


@dataclasses.dataclass(frozen=True)
class Eval:
  """Labelled images that measure accuracy; training never reads them.

  Attributes:
    source: Source of the images.
    path: Path of the images: a file, a folder or the name of a TFDS data set.
    resize: Length of the shorter side before the centre crop, in pixels. 0: no
      resizing; None: the network's usual length.
    network: Network that --mode=evaluate measures besides the teacher.
    batch_size: Images per call; None: from the network.
  """

  source: str = field(
    'none', choices=('none', 'fashion_mnist', 'npz', 'folder', 'tfds')
  )
  path: str = field('')
  resize: int | None = field(None, Bounds(0, 2**15))
  network: str = field('student', choices=('student', 'teacher', 'integer'))
  batch_size: int = field(None, Bounds(1, 10**6))


@dataclasses.dataclass(frozen=True)
class Export:
  """Deployable files.

  Attributes:
    after_training: Whether a run with integer placement ends with
      WORKDIR/export.
    folder: New folder for --mode=export; '': WORKDIR/export.
  """

  after_training: bool = field(True)
  folder: str = field('')


@dataclasses.dataclass(frozen=True)
class Dryrun:
  """TPU that --mode=dryrun compiles for.

  Attributes:
    topology: TPU slice as KIND:AxB, such as v5e:16x16, in chips.
  """

  topology: str = field('v5e:16x16')


@dataclasses.dataclass(frozen=True)
class Report:
  """Logs and profiles of a run.

  Attributes:
    log_every: Steps between lines of metrics.jsonl.
    trace_steps: Number of steps to profile into WORKDIR/trace, for XProf.
  """

  log_every: int = field(25, Bounds(1, 10**9))
  trace_steps: int = field(0, _STEPS)


@dataclasses.dataclass(frozen=True)
class Config:
  """Complete configuration of a run.

  Attributes:
    seed: Seed of all random numbers.
    budget: Length of the run relative to the short recipe. It scales the steps
      and the pool where they are not set. None: from the network.
    checkpoint_every: Steps between checkpoints.
    steps_per_call: Largest number of steps that the device makes on its own
      before Python is asked again; it may differ when a run resumes. None: 1 on
      a CPU, 10 on an accelerator.
    compute_dtype: Precision of convolutions; state and all other operations are
      float32.
  """

  seed: int = field(0, Bounds(-_INT32, _INT32 - 1))
  budget: float = field(None, Bounds(1e-4, 1000))
  checkpoint_every: int = field(100, Bounds(1, 10**9))
  steps_per_call: int | None = field(None, Bounds(1, 10**9))
  compute_dtype: str = field('float32', choices=('float32', 'bfloat16'))
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
  """Returns the description of each field, by dotted name."""
  found = {}
  for outer in dataclasses.fields(Config):
    section: Any = outer.default
    inner = dataclasses.is_dataclass(section)
    docs = documented(section if inner else Config)
    for own in dataclasses.fields(section) if inner else [outer]:
      name = f'{outer.name}.{own.name}' if inner else outer.name
      found[name] = Meaning(docs[own.name], **own.metadata)
  return found
