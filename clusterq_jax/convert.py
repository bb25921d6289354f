r"""Converts a teacher's weights to the project's own file format.

    python -m clusterq_jax.convert --arch=resnet18 --input=resnet18.pth \
        --output=resnet18.safetensors [--mean=0.485,0.456,0.406 ...] \
        [--entry=model_ema] [--class_names=names.txt]
    python -m clusterq_jax.convert --input=network.pt2 \
        --output=network.safetensors --mean=0.485,0.456,0.406 \
        --std=0.229,0.224,0.225
    python -m clusterq_jax.convert --arch=timm:regnety_004 \
        --input=regnety.pth --output=regnety.safetensors

The first form takes weights of a network that comes with the project; their
layout is recognised. The second takes any network, as torch.export.save wrote
it; torch is not needed. The third builds a network of torchvision, timm or
pytorchcv, which must be installed, and compares the result with torch.

The output also records the input that the weights expect, so that no config
needs to.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from clusterq_jax import command_line, importing
from clusterq_jax import weights as weights_lib
from clusterq_jax.errors import InputError
from clusterq_jax.importing import zoo
from clusterq_jax.models import registry
from clusterq_jax.weights import teacher

_ARCH = flags.DEFINE_string(
  'arch',
  None,
  f'Architecture: {", ".join(registry.names())}, or torchvision:NAME, '
  'timm:NAME, pytorchcv:NAME. A .pt2 file needs none.',
)
_INPUT = flags.DEFINE_string('input', None, 'Weights file to read.')
_ENTRY = flags.DEFINE_string(
  'entry', '', 'Dictionary in the file, e.g. model_ema; default: what fits.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'New .safetensors file.')
_SIZE = flags.DEFINE_list('image_size', None, 'Height,width in pixels.')
_MEAN = flags.DEFINE_list('mean', None, 'Mean of each channel.')
_STD = flags.DEFINE_list('std', None, 'Standard deviation of each channel.')
_RANGE = flags.DEFINE_float('pixel_range', None, 'Value of white: 1 or 255.')
_ORDER = flags.DEFINE_enum(
  'channel_order', None, ['rgb', 'bgr', 'grey'], 'Order of input channels.'
)
_CLASSES = flags.DEFINE_string(
  'class_names', None, 'File with one name per line.'
)


def convert(
  arch: str,
  source: str,
  output: str,
  class_names: tuple[str, ...] = (),
  entry: str = '',
  **preprocessing,
) -> str:
  """Reads weights in any layout known for `arch` and writes our own file.

  Args:
    arch: name of the architecture.
    source: path of the weights file.
    output: path of the file to write, .safetensors.
    class_names: one name for each class, or none.
    entry: entry of the source, see `weights.load`.
    **preprocessing: fields of `Preprocessing`; None takes the value in the
      source, or else the usual one.

  Returns:
    A report of the tensors read, with a warning if the expected input is
    unknown or assumed.

  Raises:
    InputError: weights that do not fit, or an output that exists.
  """
  target = importing.check_output(output, '--')
  loaded = weights_lib.load(source, arch, entry)
  report = [loaded.report, 'Nothing is missing and nothing is left over.']
  report += loaded.notes
  if class_names and len(class_names) != loaded.num_classes:
    raise InputError(
      f'--class_names: {len(class_names)} names; {source} has '
      f'{loaded.num_classes} classes'
    )
  expected, assumed = teacher.expected_input(
    source, arch, loaded, preprocessing, '--'
  )
  report += _warnings(arch, expected, assumed)
  target.parent.mkdir(parents=True, exist_ok=True)
  weights_lib.save(
    target, loaded.graph, loaded.variables, expected, class_names, arch=arch
  )
  report.append(f'{output}: {target.stat().st_size / 1e6:.2f} MB')
  return '\n'.join(report)


def import_network(
  source: str,
  output: str,
  arch: str | None = None,
  class_names: tuple[str, ...] = (),
  entry: str = '',
  **preprocessing,
) -> str:
  """Reads a whole network and writes our own file, with its graph.

  Args:
    source: a .pt2 file, or with `arch` a state dict.
    output: path of the file to write, .safetensors.
    arch: source and name of a network, such as 'timm:regnety_004'; None for a
      .pt2 file.
    class_names: one name for each class, or none.
    entry: entry of the state dict.
    **preprocessing: fields of `Preprocessing`; None takes what the source of
      the network knows, or else the usual one.

  Returns:
    A report of what was imported.

  Raises:
    InputError: a network that cannot be imported, or an output that exists.
  """
  importing.check_output(output, '--')
  known = {key: v for key, v in preprocessing.items() if v is not None}
  size = known.pop('image_size', None)
  report = []
  if arch is None:
    if entry:
      raise InputError(
        f'--entry={entry}: {source} is a program, which has no entries; leave '
        'it out'
      )
    imported = importing.import_program(source)
    h, w, _ = imported.graph.image_shape or (0, 0, 0)
    if size not in (None, (h, w)):
      raise InputError(
        f'--image_size={size}: {source} was exported for images of {h}x{w}; '
        'leave it out'
      )
    _require_normalization(known, source)
  else:
    network = zoo.build(arch, source, entry)
    usual = zoo.expected_input(arch, network)
    h, w = size or usual.pop('image_size')
    usual.pop('image_size', None)
    known = {**usual, **known}
    _require_normalization(known, arch)
    imported = importing.import_live(network, (h, w, len(known['mean'])), arch)
    report = [importing.describe(importing.parity(network, imported))]
    report.append(
      ', '.join(f'{name} {value}' for name, value in sorted(known.items()))
    )
  written = importing.write(
    imported, output, class_names=class_names, given_as='--', **known
  )
  return '\n'.join([written, *report])


def _require_normalization(known: dict[str, Any], source: str) -> None:
  for name in ('mean', 'std'):
    if name not in known:
      raise InputError(
        f'--{name} is missing: {source} does not tell what input its weights '
        'expect; networks of ImageNet usually take '
        '--mean=0.485,0.456,0.406 --std=0.229,0.224,0.225'
      )


def _warnings(
  arch: str, expected: dict[str, Any], assumed: list[str]
) -> list[str]:
  """Warns of an input that is unknown or assumed."""
  unknown = [
    name for name in ('image_size', 'mean', 'std') if name not in expected
  ]
  if unknown:
    return [
      'WARNING: the input that these weights expect is unknown; give '
      f'--{", --".join(unknown)}, or config.teacher.{", ".join(unknown)} to '
      'every run.'
    ]
  if assumed:
    values = ', '.join(f'{name} {expected[name]}' for name in assumed)
    return [
      'WARNING: the file does not tell what input these weights expect. The '
      f'usual values for {arch} are assumed: {values}. Wrong values cost '
      f'accuracy; if yours differ, give --{assumed[0]}=...'
    ]
  return []


def main(argv: list[str]) -> int:
  """Runs the command line and returns the exit code."""
  if command_line.wants_help(argv):
    print(f'{__doc__}\nflags\n{command_line.describe_flags("output")}')
    return 0
  try:
    rest = flags.FLAGS(argv)[1:]
    if rest:
      raise InputError(f'unexpected argument {rest[0]!r}; flags begin with --')
    given = {
      'image_size': _numbers(_SIZE, int, 2),
      'mean': _numbers(_MEAN, float),
      'std': _numbers(_STD, float),
      'pixel_range': _RANGE.value,
      'channel_order': _ORDER.value,
    }
    names = _class_names(_CLASSES.value) if _CLASSES.value else ()
    source, output = map(_required, (_INPUT, _OUTPUT))
    print(_convert(_ARCH.value, source, output, names, _ENTRY.value, given))
    return 0
  except flags.Error as e:
    error = InputError(f'flags: {str(e).strip().splitlines()[0]}')
  except InputError as e:
    error = e
  except OSError as e:
    error = InputError(f'{e.filename}: {e.strerror or e}')
  print(f'error: {error}', file=sys.stderr)
  return 2


def _convert(
  arch: str | None,
  source: str,
  output: str,
  class_names: tuple[str, ...],
  entry: str,
  given: dict[str, Any],
) -> str:
  """Chooses one of the forms of the command line."""
  if source.endswith('.pt2'):
    if arch:
      raise InputError(
        f'--arch={arch}: {source} holds the whole network; leave --arch out'
      )
    return import_network(source, output, None, class_names, **given)
  if arch and ':' in arch:
    return import_network(source, output, arch, class_names, entry, **given)
  if not arch:
    raise InputError(
      '--arch is missing; only a .pt2 file, written by torch.export.save, '
      'needs none'
    )
  return convert(arch, source, output, class_names, entry, **given)


def _class_names(path: str) -> tuple[str, ...]:
  """Reads the lines of a UTF-8 file, with or without a byte order mark."""
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8-sig')
  except UnicodeDecodeError as e:
    raise InputError(
      f'--class_names={path}: byte {e.start} is {e.object[e.start]:#04x}: '
      'expected a text file in UTF-8, with a class name in each line'
    ) from e
  return tuple(line.strip() for line in text.rstrip().splitlines())


def _required(flag) -> str:
  if not flag.value:
    raise InputError(f'--{flag.name} is missing')
  return flag.value


def _numbers(flag, kind, length=None):
  if flag.value is None:
    return None
  try:
    numbers = tuple(kind(text) for text in flag.value)
  except ValueError:
    numbers = ()
  if not numbers or length not in (None, len(numbers)):
    raise InputError(
      f'--{flag.name}={",".join(flag.value)}: expected '
      f'{length or "a few"} numbers between commas'
    )
  return numbers


if __name__ == '__main__':
  sys.exit(main(sys.argv))
