"""Explains the quantities of metrics.jsonl to the readers of the page.

Equation numbers are those of the paper (arXiv 2205.00179).
"""

from typing import NamedTuple


class Quantity(NamedTuple):
  """Describes a quantity of metrics.jsonl.

  Attributes:
    title: its name in words.
    unit: label of its axis.
    meaning: one sentence.
  """

  title: str
  unit: str
  meaning: str


SHARE = '% of the batch'
_SUM = 'weighted sum'
_DISTANCE = 'squared distance'
QUANTITIES = {
  'generator/accuracy': Quantity(
    'Generator: teacher accuracy',
    SHARE,
    'Share of synthetic images that the teacher assigns to the requested '
    'class.',
  ),
  'generator/diversity': Quantity(
    'Generator: diversity loss',
    _DISTANCE,
    'Distance between class statistics and centroids with noise (eq. 6). It '
    'keeps the images of a class different from each other.',
  ),
  'generator/inception': Quantity(
    'Generator: inception loss',
    'nats',
    "Cross-entropy between the teacher's prediction and the requested class "
    '(eq. 8).',
  ),
  'generator/loss': Quantity(
    'Generator: total loss',
    _SUM,
    'Weighted sum of the losses that the generator minimises. It includes the '
    'class terms after the warm-up.',
  ),
  'generator/sfda': Quantity(
    'Generator: SFDA loss',
    _DISTANCE,
    'Distance between class statistics and the centroids of their class '
    '(eq. 4).',
  ),
  'generator/statistics': Quantity(
    'Generator: statistics loss',
    _DISTANCE,
    'Distance between the statistics of the batch and those stored in the '
    "teacher's BatchNorms (eq. 9).",
  ),
  'procedural/loss': Quantity(
    'Procedural images: loss',
    _DISTANCE,
    'Statistics loss (eq. 9) of images that are optimised without a '
    'generator, averaged over a batch.',
  ),
  'student/agreement': Quantity(
    'Student: agreement',
    SHARE,
    'Share of images for which student and teacher predict the same class.',
  ),
  'student/cross_entropy': Quantity(
    'Student: cross-entropy',
    'nats',
    "Cross-entropy between the student's prediction and the class of the "
    'image (eq. 11).',
  ),
  'student/distillation': Quantity(
    'Student: distillation loss',
    'nats',
    "Kullback-Leibler divergence between the teacher's and the student's "
    'predictions (eq. 13).',
  ),
  'student/features': Quantity(
    'Student: features loss',
    'relative squared error',
    "Squared error of the student's layer outputs, relative to the mean "
    "square of the teacher's.",
  ),
  'student/loss': Quantity(
    'Student: total loss',
    _SUM,
    'Weighted sum of the losses that the student minimises.',
  ),
}


def describe(key: str) -> Quantity:
  """Returns the description of a quantity; its key alone if it is unknown.

  Args:
    key: name of the quantity in metrics.jsonl.
  """
  return QUANTITIES.get(key, Quantity(key, key, ''))
