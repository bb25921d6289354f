"""Tables with one row per record: speed, scaling, checks, quoted figures."""

from typing import Any

from benchmarks import records
from benchmarks.records import Record
from benchmarks.results_format import Column, Table, figure, network, plain

_NETWORK: Column = ('network', network, '')
_BITS: Column = ('bits', 'bits', '')
_PYTHON = 'python -m benchmarks.'


def _step(ratio: str) -> list[Column]:
  """Lists the columns of a step's cost; ratio: format of its ratios."""
  return [
    ('s per step', 's', '.3f'),
    ('CPU time per step, s', 'cpu_s', '.3f'),
    ('CPU time against the first row', 'ratio', f'{ratio} ×'),
    ('compiled program, MB', 'mb', ',d'),
    ('peak of the process, MB', 'peak_mb', ',d'),
  ]


def _milliseconds(key: str) -> Any:
  return lambda r: f'{r[key]:.3f}' if r[key] < 1 else f'{r[key]:.1f}'


def _range(record: Record) -> str:
  """Writes the value of a trial, or its two ends, with the unit."""
  value = record['value']
  text = (
    f'{value:g}'
    if not isinstance(value, list)
    else '{:g} to {:g}'.format(*value)
  )
  return f'{text} {record["unit"]}'.strip()


def _of(record: Record) -> str:
  return network(record) if record['config'] else 'several'


def _share(key: str) -> Any:
  return lambda record: f'{record[key]:,} of {record["images"]:,}'


_TRIAL: list[Column] = [
  ('figure', 'what', ''),
  ('network', _of, ''),
  _BITS,
  ('value', _range, ''),
]
_COMPILED: list[Column] = [
  ('chips', 'chips', 'd'),
  ('images per batch', 'batch', ',d'),
  ('images per chip', 'per_chip', 'd'),
  ('memory per chip, GB', 'gb_per_chip', '.2f'),
  ('work per chip, GFLOP', 'gflop_per_chip', ',d'),
  ('collectives, MB', 'collectives_mb', ',.1f'),
  ('ms per step', 'ms', '.1f'),
  ('efficiency, %', 'efficiency', '.1f'),
]
# By name of the table: record file, values of its records, columns, command.
SPECS: dict[str, tuple[str, dict[str, Any], list[Column], str]] = {
  'published': (
    'published',
    {'group': 'drop'},
    [
      ('method', 'method', ''),
      ('network', lambda r: f'{r["network"]}, {r["data"]}', ''),
      _BITS,
      ('float32 top-1, %', lambda r: r.get('float'), '.2f'),
      ('quantized top-1, %', lambda r: r.get('top1'), '.2f'),
      ('drop, points', 'drop', '.2f'),
    ],
    '',
  ),
  'published_class_terms': (
    'published',
    {'group': 'class_terms'},
    [
      ('variant', lambda r: f'`{r["variant"]}`', ''),
      ('network', lambda r: f'{r["network"]}, {r["data"]}', ''),
      _BITS,
      ('quantized top-1, %', 'top1', '.2f'),
    ],
    '',
  ),
  'latency': (
    'integer',
    {'group': 'latency'},
    [
      _NETWORK,
      _BITS,
      ('images per call', 'batch', 'd'),
      ('float32, ms', _milliseconds('float_ms'), ''),
      ('integer, ms', _milliseconds('integer_ms'), ''),
      ('speed against float32', 'speedup', '.2f ×'),
      ('float32 file, kB', 'float_kb', ',d'),
      ('integer file, kB', 'integer_kb', ',d'),
      ('file size', lambda r: f'1/{r["size_ratio"]:.2f}', ''),
    ],
    _PYTHON + 'integer_latency runs/mine/export --rounds=10',
  ),
  'exactness': (
    'integer',
    {'group': 'exactness'},
    [
      _NETWORK,
      _BITS,
      ('logits equal in every bit, images', _share('equal_images'), ''),
      (
        'same class as the fake-quantized network, images',
        _share('same_class_fake_quantized'),
        '',
      ),
    ],
    _PYTHON + 'bit_exactness runs/mine',
  ),
  'openvino': (
    'integer',
    {'group': 'openvino'},
    [
      _NETWORK,
      ('bits', lambda r: r['bits'] or 'not recorded', ''),
      ('same class as the integer network, % of images', 'same_class', '.4g'),
    ],
    _PYTHON + 'bit_exactness runs/mine',
  ),
  'export': (
    'integer',
    {'group': 'export'},
    [
      ('network', lambda r: f'`{r["arch"]}`', ''),
      _BITS,
      ('logits equal in every bit, images', _share('equal_images'), ''),
      ('convolutions', 'convolutions', 'd'),
      ('of these in integers', 'integer_convolutions', 'd'),
      ('file size', lambda r: f'1/{r["size_ratio"]:.2f}', ''),
    ],
    _PYTHON + 'export_architectures --bits=8 --images=64',
  ),
  'pytorch': (
    'step_time',
    {'group': 'pytorch'},
    [
      ('CPU', lambda r: r['machine']['cpu'], ''),
      ('state', 'state', ''),
      ('generator', 'generator', ''),
      ('JAX, s', 'jax_s', '.2f'),
      ('PyTorch, s', 'torch_s', '.2f'),
      ('JAX against PyTorch, time', 'ratio', '.2f ×'),
    ],
    _PYTHON + 'step_time',
  ),
  'imagenet': (
    'step_time',
    {'group': 'imagenet'},
    [
      ('network', lambda r: f'`{r["arch"]}`', ''),
      ('step', 'step', ''),
      ('images per batch', 'batch', 'd'),
      ('s per step', 's', '.2f'),
      ('peak of the process, GB', 'peak_gb', '.1f'),
    ],
    _PYTHON
    + 'imagenet_step r18.safetensors --config=configs/resnet18.py '
    + '--channels=128,96,64,32,16,8',
  ),
  'scaling_batch': (
    'scaling',
    {'group': 'batch'},
    [('images per batch', 'batch', 'd'), *_step('.1f')],
    _PYTHON + 'scaling batch',
  ),
  'scaling_classes': (
    'scaling',
    {'group': 'classes'},
    [
      ('classes', 'classes', ',d'),
      ('generator step, CPU s', 'generator_cpu_s', '.3f'),
      ('against the first row', 'generator_ratio', '.2f ×'),
      ('program, MB', 'generator_mb', ',d'),
      ('student step, CPU s', 'student_cpu_s', '.3f'),
      ('against the first row', 'student_ratio', '.2f ×'),
      ('program, MB', 'student_mb', ',d'),
    ],
    _PYTHON + 'scaling classes',
  ),
  'scaling_network': (
    'scaling',
    {'group': 'network'},
    [('network', 'network', ''), *_step('.1f')],
    _PYTHON + 'scaling network',
  ),
  'scaling_devices': (
    'scaling',
    {'group': 'devices'},
    [
      ('fake devices', 'devices', 'd'),
      ('threads', 'threads', 'd'),
      *_step('.2f'),
    ],
    _PYTHON + 'scaling devices',
  ),
  'scaling_steady': (
    'scaling',
    {'group': 'steady'},
    [
      ('after steps', 'steps', ',d'),
      ('median step, ms', 'median_ms', '.2f'),
      ('mean step, ms', 'mean_ms', '.2f'),
      ('CPU time per step, ms', 'cpu_ms', '.2f'),
      ('memory of the process, MB', 'mb', ',.1f'),
    ],
    _PYTHON + 'scaling steady',
  ),
  'weak_resnet18': (
    'weak_scaling',
    {'arch': 'resnet18'},
    _COMPILED,
    _PYTHON + 'weak_scaling resnet18',
  ),
  'weak_resnet50': (
    'weak_scaling',
    {'arch': 'resnet50'},
    _COMPILED,
    _PYTHON + 'weak_scaling resnet50',
  ),
  'fuzz': (
    'checks',
    {'group': 'fuzz'},
    [
      ('inputs', 'inputs', ',d'),
      ('loaded', 'loaded', ',d'),
      ('refused in one line', 'refused', ',d'),
      ('findings', 'findings', 'd'),
      ('time, minutes', 'minutes', 'd'),
    ],
    'CLUSTERQ_FUZZ_INPUTS=10000 CLUSTERQ_FUZZ_SEED=0 launch/test.sh tests/fuzz',
  ),
  'tests': (
    'checks',
    {'group': 'tests'},
    [
      ('CPU', lambda r: r['machine']['cpu'], ''),
      ('time of all tests, minutes', lambda r: _ends(r['minutes']), ''),
    ],
    'launch/test.sh',
  ),
  **{
    f'trials_{group}': ('trials', {'group': group}, _TRIAL, '')
    for group in ('scatter', 'headroom', 'prototypes', 'earlier', 'devices')
  },
}


def _ends(pair: list[float]) -> str:
  low, high = map(figure, pair)
  return low if low == high else f'{low} to {high}'


def table(name: str) -> Table:
  """Makes the table of this name.

  Raises:
    KeyError: no table has this name.
  """
  file, fields, columns, command = SPECS[name]
  return plain(columns, records.read(file, **fields), command)
