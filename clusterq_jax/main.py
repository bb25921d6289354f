"""The command line: flags and mode dispatch only.

    python -m clusterq_jax.main --config=configs/NAME.py --workdir=DIR \
        [--mode=quantize|evaluate|export] [--config.field=value ...]
"""

import sys

import ml_collections
from absl import flags
from ml_collections import config_flags

from clusterq_jax import export, report, train
from clusterq_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'What to run.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_MODES = {
  'quantize': train.quantize,
  'evaluate': train.evaluate,
  'export': export.export,
}
_MODE = flags.DEFINE_enum('mode', 'quantize', list(_MODES), 'What to do.')


def main(argv: list[str]) -> int:
  """Runs one mode; returns the exit code."""
  try:
    config, workdir = _parse(argv)
    results = _MODES[_MODE.value](config, workdir)
    print(report.closing_table(results, config, workdir))
  except InputError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  except OSError as e:  # a full disk, a folder taken away
    where = e.filename or _WORKDIR.value
    print(f'error: {where}: {e.strerror or e}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(
      'interrupted; the same command resumes from the last checkpoint',
      file=sys.stderr,
    )
    return 130
  return 0


def _parse(argv: list[str]) -> tuple[ml_collections.ConfigDict, str]:
  try:
    rest = flags.FLAGS(argv)[1:]
    # A config file that could not be read raises once it is looked at.
    getattr(_CONFIG.value, 'to_dict', None)
  except OSError as e:
    reason = str(e).strip().splitlines()[-1].strip()
    raise InputError(f'--config: {reason}') from e
  except Exception as e:  # a config file may raise anything
    raise InputError(f'flags: {str(e).strip().splitlines()[0]}') from e
  if rest:
    raise InputError(f'unexpected argument {rest[0]!r}; flags begin with --')
  if _CONFIG.value is None or not _WORKDIR.value:
    raise InputError('--config=configs/NAME.py and --workdir=DIR are required')
  return _CONFIG.value, _WORKDIR.value


if __name__ == '__main__':
  sys.exit(main(sys.argv))
