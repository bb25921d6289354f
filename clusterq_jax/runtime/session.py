"""Builds the parts of a run: teacher, steps, random keys, programs."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clusterq_jax import config as config_lib
from clusterq_jax import data, sharding
from clusterq_jax.config import Config, derive
from clusterq_jax.deploy import fold
from clusterq_jax.errors import InputError
from clusterq_jax.method import optimizers
from clusterq_jax.method import phases as phases_lib
from clusterq_jax.method.generator import Generator
from clusterq_jax.method.networks import Networks
from clusterq_jax.method.phases import Phase
from clusterq_jax.method.pool import PoolLayout
from clusterq_jax.method.state import TrainState
from clusterq_jax.method.steps import Steps
from clusterq_jax.quant import plan as plan_lib
from clusterq_jax.quant import quantizers
from clusterq_jax.runtime import metrics
from clusterq_jax.runtime.compiler import Compiler, Pending, Program
from clusterq_jax.weights import teacher as teacher_lib
from clusterq_jax.weights.teacher import Teacher

_STEPS_PER_CALL = 10  # on an accelerator

# Streams of random numbers. `Session.keys` folds a stream's index into the key
# of the run's seed, so new streams go at the end.
_STREAMS = ('init', 'train', 'centroids', 'calibration', 'held_out', 'samples')


def load_teacher(config: Config) -> Teacher:
  """Loads the teacher that `config.teacher` describes.

  The lead process prints the loader's notes to stderr.

  Raises:
    InputError: the weights cannot be read or do not fit the config.
  """
  section = dataclasses.asdict(config.teacher)
  if not section['weights']:
    raise InputError("config.teacher.weights='': expected a weights file")
  teacher = teacher_lib.load(path=section.pop('weights'), **section)
  if sharding.is_lead():
    for note in teacher.notes:
      print(note, file=sys.stderr)
  return teacher


def complete(config: Config, teacher: Teacher) -> Config:
  """Fills in the values that follow from the teacher.

  Args:
    config: resolved config.
    teacher: teacher of the run.

  Raises:
    InputError: fields do not fit together.
  """
  size = teacher.preprocessing.image_size
  return config_lib.complete(config, size, teacher.num_classes)


def load_images(config: Config, teacher: Teacher) -> data.Images | None:
  """Loads the labelled images that `config.eval` describes.

  Args:
    config: resolved config.
    teacher: teacher of the run; it determines the size of the images.

  Returns:
    The images, or None with `config.eval.source` 'none'.

  Raises:
    InputError: the images cannot be read or do not fit the teacher.
  """
  shape, resize = teacher.preprocessing.shape, config.eval.resize
  if resize is None:
    resize = teacher.resize
  return data.load(
    config.eval.source,
    config.eval.path,
    shape,
    teacher.num_classes,
    resize,
    teacher.class_names,
  )


def bits_of(config: Config) -> plan_lib.Bits:
  """Returns the bit widths and the placement of a config."""
  quant = config.quant
  return plan_lib.Bits(
    weights=quant.weight_bits,
    activations=quant.activation_bits,
    first=quant.first_weight_bits,
    last=quant.last_weight_bits,
    placement=quant.placement,
  )


def _networks(
  config: Config, teacher: Teacher, mesh: jax.sharding.Mesh
) -> Networks:
  learned = config.quant.ranges == 'learned'
  limit = teacher.preprocessing.limit
  dtype = jnp.bfloat16 if config.compute_dtype == 'bfloat16' else None
  return Networks(
    build=teacher.build,
    graph=teacher.graph,
    plan=plan_lib.make_plan(teacher.graph, bits_of(config), learned, limit),
    generator=Generator(
      shape=teacher.preprocessing.shape,
      num_classes=teacher.num_classes,
      latent_dim=config.generator.latent_dim,
      channels=config.generator.channels,
      conditional=config.generator.conditional,
      prototypes=config.generator.prototypes,
      dtype=dtype,
    ),
    preprocessing=teacher.preprocessing,
    batch_size=config.schedule.batch_size,
    mesh=mesh,
    dtype=dtype,
  )


def _first_semantic_layer(config: Config, teacher: Teacher) -> int:
  layers, first = len(teacher.graph.batch_norms), config.centroids.first_layer
  if first is None:
    return derive.first_semantic_layer(layers)
  if not 0 <= first < layers:
    raise InputError(
      f'config.centroids.first_layer={first}: expected 0 to {layers - 1}'
    )
  return first


def make_steps(
  config: Config,
  teacher: Teacher,
  devices: Sequence[jax.Device] | None = None,
) -> Steps:
  """Builds the training steps of a run; nothing is compiled.

  Args:
    config: resolved config.
    teacher: teacher of the run.
    devices: devices to run on; None means all devices.

  Raises:
    InputError: `config.centroids.first_layer` names no layer, the batch does
      not divide among the devices, or fields do not fit together.
  """
  config = complete(config, teacher)
  s = config.schedule
  mesh = sharding.make_mesh(s.batch_size, devices)
  return Steps(
    networks=_networks(config, teacher, mesh),
    config=config,
    pool=PoolLayout(
      s.pool_batches,
      s.procedural_batches,
      s.batch_size,
      teacher.preprocessing,
    ),
    first_semantic_layer=_first_semantic_layer(config, teacher),
    generator_optimizer=optimizers.for_generator(config),
    student_optimizer=optimizers.for_student(config),
  )


class Session:
  """Objects that the parts of one run share.

      session = Session(config)
      state = session.init()
      for phase in session.phases:
        program = session.program(phase)
        state = session.enter(phase, state)
        for _ in range(phase.length):
          state, metrics = program(state, *session.step_arguments)

  Attributes:
    config: complete config.
    teacher: teacher of the run.
    steps: training steps of the method.
    phases: phases with at least one step, in order.
    compile: compiler that adds up its seconds.
  """

  def __init__(
    self,
    config: Config,
    teacher: Teacher | None = None,
    devices: Sequence[jax.Device] | None = None,
  ):
    """Prepares a run; nothing is compiled yet.

    Args:
      config: resolved config.
      teacher: teacher of the run; None loads it.
      devices: devices to run on; None means all devices.

    Raises:
      InputError: the teacher cannot be loaded, or the batch does not divide
        among the devices.
    """
    self.teacher = load_teacher(config) if teacher is None else teacher
    self.steps = make_steps(config, self.teacher, devices)
    self.config = self.steps.config
    self.phases = phases_lib.phases(self.config.schedule)
    self.compile = Compiler(self.mesh)
    self._programs: dict[str, Pending] = {}

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """Mesh of the devices that the run uses."""
    return self.steps.networks.mesh

  @functools.cached_property
  def variables(self) -> Any:
    """Teacher's variables, replicated on every device."""
    everywhere = sharding.replicated(self.mesh)
    return jax.device_put(self.teacher.variables, everywhere)

  @functools.cached_property
  def keys(self) -> dict[str, jax.Array]:
    """PRNG keys by name of the stream, such as 'init' and 'train'."""

    def make():
      root = jax.random.key(self.config.seed)
      return [jax.random.fold_in(root, i) for i in range(len(_STREAMS))]

    made = jax.jit(make, out_shardings=sharding.replicated(self.mesh))()
    return dict(zip(_STREAMS, made, strict=True))

  @property
  def centroid_batches(self) -> int:
    """Number of batches of images that initialise the centroids."""
    images = (
      self.config.centroids.images_per_class * self.steps.networks.num_classes
    )
    return -(-images // self.config.schedule.batch_size)

  @property
  def step_arguments(self) -> tuple[Any, ...]:
    """Arguments of one step after the state, as for `arguments(1)`."""
    return self.arguments(1)

  @functools.cached_property
  def steps_per_call(self) -> int:
    """Largest number of steps in one call of a phase's program."""
    if self.config.steps_per_call is not None:
      return self.config.steps_per_call
    on_cpu = self.mesh.devices.flat[0].platform == 'cpu'
    return 1 if on_cpu else _STEPS_PER_CALL

  def arguments(self, count: int) -> tuple[Any, ...]:
    """Returns the arguments of a phase's program after the state.

    Args:
      count: number of steps to make, 1 to `steps_per_call`.

    Returns:
      Teacher's variables and key. The number follows where `steps_per_call` is
      above 1; programs of single steps do not take it.
    """
    own = self.variables, self.keys['train']
    return own if self.steps_per_call == 1 else (*own, np.int32(count))

  # --------------------------------------------------------- the state

  def init(self) -> TrainState:
    """Returns the state before the first step."""
    return self._init(self.keys['init'], self.variables)

  @functools.cached_property
  def _init(self) -> Callable[..., TrainState]:
    everywhere = sharding.replicated(self.mesh)
    return jax.jit(self.steps.init, out_shardings=everywhere)

  def abstract_state(self) -> TrainState:
    """Returns the state as `jax.ShapeDtypeStruct` leaves with shardings."""
    return self._abstract_state

  @functools.cached_property
  def _abstract_state(self) -> TrainState:
    return self.steps.abstract_state(self.keys['init'], self.variables)

  # -------------------------------------------------------- the phases

  def prepare(self, phase: Phase, entered: bool = False) -> None:
    """Begins to compile what a phase needs.

    Args:
      phase: phase of the run.
      entered: whether the transitions before the phase are over.
    """
    for name in (phase.step,) if entered else (*phase.on_enter, phase.step):
      self._prepare(name)

  def _prepare(self, name: str) -> None:
    """Begins to compile a method of `Steps`."""
    function, arguments = self._function(name), self._arguments(name)
    self.start(function, self.abstract_state(), *arguments, donate=True)

  def program(self, phase: Phase) -> Program:
    """Returns a phase's compiled step, or steps if a call makes several.

    It is a function of (state, *arguments(count)).

    Args:
      phase: phase of the run.
    """
    self.prepare(phase, entered=True)
    return self.wait(phase.step)

  def start(self, function: Callable, *args: Any, donate: bool = False) -> None:
    """Compiles a function in the compiler's thread, unless it has begun to.

    Args:
      function: function of `args`.
      *args: arrays or shapes.
      donate: whether the program may reuse the memory of the first argument.
    """
    name = function.__name__
    if name not in self._programs:
      self._programs[name] = self.compile.start(function, *args, donate=donate)

  def wait(self, name: str) -> Program:
    """Returns the program of that name once it is compiled."""
    return self.compile.wait(self._programs[name])

  def forget(self, name: str) -> None:
    """Drops a program that is no longer needed, because its code takes memory.

    Args:
      name: name of the function of `start`.
    """
    self._programs.pop(name, None)
    metrics.release_memory()

  def _function(self, name: str) -> Callable:
    """Returns a method of `Steps`; in a loop if calls make several steps."""
    function = getattr(self.steps, name)
    is_step = any(name == phase.step for phase in self.phases)
    if is_step and self.steps_per_call > 1:
      return self.steps.repeated(function)
    return function

  def _arguments(self, name: str) -> tuple[Any, ...]:
    """Returns the arguments after the state of a method of `Steps`."""
    if name == 'initialize_centroids':
      keys = jax.random.split(self.keys['centroids'], self.centroid_batches)
      return self.variables, keys
    if name == 'calibrate_student':
      return self.variables, self.keys['calibration']
    return self.step_arguments

  def enter(self, phase: Phase, state: TrainState) -> TrainState:
    """Applies the transitions that precede the first step of a phase."""
    for name in phase.on_enter:
      state = self.transition(name, state)
      self.forget(name)
    return state

  def transition(self, name: str, state: TrainState) -> TrainState:
    """Applies a transition, such as 'calibrate_student'.

    Args:
      name: name of a method of `Steps`.
      state: train state, which is donated.
    """
    self._prepare(name)
    return self.wait(name)(state, *self._arguments(name))

  # ------------------------------------------------------- the student

  def deliver(self, state: TrainState) -> TrainState:
    """Returns the state with the final student.

    The weights move onto their quantization grid, and the activation ranges
    gain headroom. With `integer` placement, the biases become equal to the
    rounded biases of the integer network.
    """
    networks, quant = self.steps.networks, self.config.quant

    @jax.jit
    def settle(student):
      widened = quantizers.widen(
        networks.plan,
        student['quant'],
        networks.graph.last_stage,
        quant.headroom,
      )
      params = quantizers.settle(networks.plan, student)
      return {**student, 'params': params, 'quant': widened}

    student = settle(state.student)
    if quant.placement == 'integer':
      batch_stats = self.teacher.variables['batch_stats']
      whole = {**jax.device_get(student), 'batch_stats': batch_stats}
      folded = fold.fold(
        networks.graph, networks.plan, whole, networks.preprocessing
      )
      student['params'] = jax.device_put(
        fold.round_biases(folded, whole), sharding.replicated(self.mesh)
      )
    return state.replace(student=student)
