"""Parses the command line and runs a mode.

    clusterq --config=NAME --workdir=DIR [--mode=...] [--config.field=value ...]

`clusterq` is short for `python -m clusterq_jax.main`. A distributed run starts
every process with the same command; see `distributed.initialize`.
"""

import difflib
import sys
import traceback

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from clusterq_jax import command_line, sharding
from clusterq_jax import config as config_lib
from clusterq_jax.config import shipped
from clusterq_jax.errors import InputError
from clusterq_jax.modes import dryrun, evaluate, export, quantize, report
from clusterq_jax.report import closing_table
from clusterq_jax.runtime import compilation_cache, distributed
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime.preemption import Preempted

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Name of a shipped config, or path of a Python config file.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run or gs://BUCKET/PATH; made if missing.'
)
_MODES = {
  'quantize': quantize.quantize,
  'evaluate': evaluate.evaluate,
  'export': export.export,
  'report': report.report,
}
_MODE = flags.DEFINE_enum(
  'mode', 'quantize', [*_MODES, 'dryrun', 'config'], 'What to do; see above.'
)
_DISTRIBUTED = flags.DEFINE_enum(
  'distributed',
  'auto',
  ['auto', 'on', 'off'],
  'Whether to connect to the other processes of a run; auto: on a cluster.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address',
  None,
  'HOST:PORT of process 0; needed with --distributed=on outside a cluster.',
)
_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes; see --coordinator_address.'
)
_PROCESS = flags.DEFINE_integer(
  'process_id',
  None,
  'Number of this process, from 0; see --coordinator_address.',
)


_HELP = """Quantizes a trained image classifier without data.

    clusterq --config=NAME --workdir=DIR [--mode=MODE] [--config.FIELD=VALUE]

`clusterq` is short for `python -m clusterq_jax.main`. NAME is the path of a
Python file or one of these shipped configs:
{configs}

modes
  quantize   quantizes the teacher and exports the student, or resumes an
             unfinished run in the workdir (the default)
  evaluate   measures teacher and student on labelled images
  export     writes the deployable files of a finished run again: the integer
             ONNX file and its self-test
  report     writes report.html with curves, images and the errors of each
             layer; needs pip install 'clusterq-jax[report]'
  dryrun     compiles every step for a TPU pod, without a TPU, and prints its
             memory and time
  config     prints every value of a config with its meaning

flags
{flags}
  --config.FIELD=VALUE
      Sets a field of the config. --mode=config prints all fields.

examples
  quantize the embedded teacher with 3-bit weights:
    clusterq --config=fashion_mnist_resnet20 --workdir=runs/three \\
        --config.quant.weight_bits=3
  quantize your weights, then measure the student on your images:
    clusterq --config=resnet18 --workdir=runs/mine \\
        --config.teacher.weights=resnet18.safetensors
    clusterq --config=resnet18 --workdir=runs/mine \\
        --config.teacher.weights=resnet18.safetensors \\
        --mode=evaluate --config.eval.source=folder --config.eval.path=images
  print every value of a config:
    clusterq --config=resnet18 --mode=config
"""


def main(argv: list[str]) -> int:
  """Runs one mode.

  Args:
    argv: arguments of the command line, program name first.

  Returns:
    The exit code: 0 for success or a saved stop by SIGTERM, 1 for a lost
    process or a step that does not fit, 2 for unusable input, 130 for Ctrl-C.
  """
  if command_line.wants_help(argv):
    described = command_line.describe_flags('mode')
    configs = '\n'.join(f'  {name}' for name in shipped.names())
    print(_HELP.format(flags=described, configs=configs))
    return 0
  try:
    config, workdir = _parse(argv)
    compilation_cache.enable()
    if _MODE.value == 'dryrun':
      return dryrun.dryrun(config)
    if _MODE.value == 'config':
      print(_described(config))
      return 0
    decision = distributed.initialize(
      _DISTRIBUTED.value, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    )
    # On one machine without a cluster there is no decision to report.
    if _DISTRIBUTED.value != 'off' and decision != distributed.ALONE:
      print(f'distributed: {decision}', file=sys.stderr)
    if sharding.is_lead() or _MODE.value == 'quantize':
      results = _MODES[_MODE.value](config, workdir)
    if sharding.is_lead():
      print(closing_table.closing_table(results, config, workdir))
  except Preempted as e:
    print(e, file=sys.stderr)
    return 0
  except InputError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  except OSError as e:  # such as a full disk or a removed folder
    where = e.filename or _WORKDIR.value or 'output'
    print(f'error: {where}: {e.strerror or e}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(
      'interrupted; the same command resumes from the last checkpoint',
      file=sys.stderr,
    )
    return 130
  except Exception as e:
    if not jax.distributed.is_initialized():
      raise
    traceback.print_exc()
    reason = (str(e).strip() or repr(e)).splitlines()[0]
    distributed.tell_lost_process(reason)
    return 1
  return 0


def _described(config: ml_collections.ConfigDict) -> str:
  """Formats every value of a config, completed if the weights can be read."""
  resolved = config_lib.resolve(config)
  try:
    teacher = session_lib.load_teacher(resolved)
    resolved = session_lib.complete(resolved, teacher)
  except InputError as e:
    why = f'None where the value follows from the network: {e}'
    print(why, file=sys.stderr)
  return config_lib.describe(resolved)


def _parse(argv: list[str]) -> tuple[ml_collections.ConfigDict, str]:
  """Parses the flags and returns (config, workdir).

  Raises:
    InputError: a flag, a field or the config file cannot be used.
  """
  argv = _with_path(argv)
  try:
    rest = flags.FLAGS(argv)[1:]
    # ml_collections raises the error of an unreadable config file on access.
    getattr(_CONFIG.value, 'to_dict', None)
  except OSError as e:
    reason = str(e).strip().splitlines()[-1].strip()
    raise InputError(f'--config: {reason}') from e
  except Exception as e:  # a config file may raise anything
    lines = str(e).strip().splitlines() or [repr(e)]
    # The first line names the action of ml_collections, the last the error.
    reason = ' '.join(dict.fromkeys((lines[0].strip(), lines[-1].strip())))
    unknown = _unknown_field(argv)
    raise InputError(unknown or f'flags: {reason}') from e
  if rest:
    raise InputError(
      f'unexpected argument {rest[0]!r}; expected flags, which begin with --'
    )
  needs_workdir = _MODE.value not in ('config', 'dryrun')
  if _CONFIG.value is None or needs_workdir and not _WORKDIR.value:
    raise InputError('--config=NAME and --workdir=DIR are required')
  return _CONFIG.value, _WORKDIR.value or ''


def _with_path(argv: list[str]) -> list[str]:
  """Returns the arguments with the name of a shipped config made a path."""
  found = list(argv)
  for i, argument in enumerate(argv):
    flag, equals, value = argument.partition('=')
    if flag not in ('--config', '-config'):
      continue
    if equals:
      found[i] = f'{flag}={shipped.find(value)}'
    elif i + 1 < len(argv):
      found[i + 1] = shipped.find(argv[i + 1])
  return found


def _unknown_field(argv: list[str]) -> str:
  """Returns an error for the first unknown config field of `argv`, or ''."""
  fields = config_lib.flatten(config_lib.default_config())
  known = [f'config.{field}' for field in fields]
  for argument in argv[1:]:
    name = argument.lstrip('-').partition('=')[0]
    if name.startswith('config.') and name not in known:
      close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
      hint = '--mode=config lists them'
      if close:
        hint = f'did you mean --{close[0]}?'
      return f'--{name}: unknown field; {hint}'
  return ''


def run() -> None:
  """Runs the command line and exits; entry point of `clusterq`."""
  sys.exit(distributed.exit_process(main(sys.argv)))


if __name__ == '__main__':
  run()
