"""The command line: flags and mode dispatch only.

    python -m clusterq_jax.main --config=configs/NAME.py --workdir=DIR \
        [--mode=quantize|evaluate|export|report|dryrun] \
        [--config.field=value ...]

Where it is one of several processes, each is started with the same command; see
`sharding.start`.
"""

import sys
import traceback

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from clusterq_jax import dryrun, export, html_report, report, sharding, train
from clusterq_jax.errors import InputError
from clusterq_jax.preemption import Preempted

_CONFIG = config_flags.DEFINE_config_file('config', None, 'What to run.')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run, or gs://BUCKET/PATH.'
)
_MODES = {
  'quantize': train.quantize,
  'evaluate': train.evaluate,
  'export': export.export,
  'report': html_report.write,
}
_MODE = flags.DEFINE_enum(
  'mode', 'quantize', [*_MODES, 'dryrun'], 'What to do.'
)
_DISTRIBUTED = flags.DEFINE_enum(
  'distributed',
  'auto',
  ['auto', 'on', 'off'],
  'Whether this is one of several processes; auto: on a cluster.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address', None, 'HOST:PORT of process 0; off a cluster.'
)
_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Processes in all; off a cluster.'
)
_PROCESS = flags.DEFINE_integer(
  'process_id', None, 'Number of this process, from 0; off a cluster.'
)


def main(argv: list[str]) -> int:
  """Runs one mode; returns the exit code."""
  try:
    config, workdir = _parse(argv)
    if _MODE.value == 'dryrun':
      return dryrun.dryrun(config)
    decision = sharding.start(
      _DISTRIBUTED.value, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    )
    if _DISTRIBUTED.value != 'off':
      print(f'distributed: {decision}', file=sys.stderr)
    if sharding.is_lead() or _MODE.value == 'quantize':
      results = _MODES[_MODE.value](config, workdir)
    if sharding.is_lead():
      print(report.closing_table(results, config, workdir))
  except Preempted as e:
    print(e, file=sys.stderr)
    return 0
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
  except Exception as e:
    if not jax.distributed.is_initialized():
      raise
    traceback.print_exc()
    reason = (str(e).strip() or repr(e)).splitlines()[0]
    print(sharding.gone(reason), file=sys.stderr)
    return 1
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
    lines = str(e).strip().splitlines() or [repr(e)]
    # ml_collections says what it was doing, then all of the traceback.
    reason = ' '.join(dict.fromkeys((lines[0].strip(), lines[-1].strip())))
    raise InputError(f'flags: {reason}') from e
  if rest:
    raise InputError(f'unexpected argument {rest[0]!r}; flags begin with --')
  needs_workdir = _MODE.value != 'dryrun'
  if _CONFIG.value is None or needs_workdir and not _WORKDIR.value:
    raise InputError('--config=configs/NAME.py and --workdir=DIR are required')
  return _CONFIG.value, _WORKDIR.value or ''


if __name__ == '__main__':
  sys.exit(sharding.leave(main(sys.argv)))
