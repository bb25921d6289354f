r"""Converts a teacher's weights to the project's own file format.

    python -m clusterq_jax.convert --arch=resnet18 --input=resnet18.pth \
        --output=resnet18.safetensors [--mean=0.485,0.456,0.406 ...] \
        [--entry=model_ema] [--class_names=names.txt]

The source's layout is recognised and the result is printed. The output also
records the input that the weights expect, so that no config needs to.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from clusterq_jax import command_line
from clusterq_jax import weights as weights_lib
from clusterq_jax.errors import InputError
from clusterq_jax.models import registry
from clusterq_jax.weights import teacher

_ARCH = flags.DEFINE_enum('arch', None, registry.names(), 'Architecture.')
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
  target = pathlib.Path(output)
  if target.suffix != '.safetensors':
    raise InputError(f'--output={output}: expected a name in .safetensors')
  if target.exists():
    raise InputError(f'--output={output}: exists; remove it, or name another')
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
    arch, source, output = map(_required, (_ARCH, _INPUT, _OUTPUT))
    print(convert(arch, source, output, names, _ENTRY.value, **given))
    return 0
  except flags.Error as e:
    error = InputError(f'flags: {str(e).strip().splitlines()[0]}')
  except InputError as e:
    error = e
  except OSError as e:
    error = InputError(f'{e.filename}: {e.strerror or e}')
  print(f'error: {error}', file=sys.stderr)
  return 2


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
