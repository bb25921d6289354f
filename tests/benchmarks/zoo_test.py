"""The benchmark of foreign networks: processes, limits, and what is resumed."""

import json
import os
import sys
import time

import pytest

from benchmarks import records, zoo
from clusterq_jax import importing

_LIMITS = zoo.Limits(seconds=30, megabytes=1000)


def _tell(script, report):
  """Runs a script, in which `say` adds to the report."""

  def say(**found):
    with report.open('a') as file:
      file.write(json.dumps(found) + '\n')

  exec(script, {'say': say, 'report': report, 'os': os, 'time': time})


def _run(script, limits=_LIMITS):
  return zoo.supervise(_tell, (script,), limits)


def test_parity_is_what_an_import_calls_sound():
  assert zoo.PARITY == importing.SOUND


def test_a_process_that_ends_well():
  found = _run(
    'say(stage="load"); say(nodes=3); print(1); say(stage="parity"); say(x=2)'
  )
  assert 0 < found.pop('wall_s') < 30
  assert 0 <= found.pop('peak_mb') < 1000
  assert found == {'stage': 'parity', 'nodes': 3, 'x': 2}


@pytest.mark.parametrize(
  ('script', 'reason'),
  [
    ('1 / 0', 'ZeroDivisionError: division by zero'),
    ('os._exit(3)', 'exit code 3'),
    ('os.kill(os.getpid(), 9)', 'killed by SIGKILL'),
    ('report.open("a").write("{half"); 1 / 0', 'ZeroDivisionError'),
  ],
)
def test_a_process_that_fails(script, reason):
  found = _run(f'say(stage="load"); {script}')
  assert found['stage'] == 'load'
  assert found['reason'].startswith(reason)
  assert zoo.outcome(found) == 'fails in load'


def test_a_process_that_dies_before_its_first_stage():
  found = _run('import no_such_module')
  assert found['stage'] is None
  assert 'no_such_module' in found['reason']
  assert zoo.has(found, 'parity')


def test_limits():
  found = _run('time.sleep(60)', zoo.Limits(1, 1000))
  assert found['reason'] == 'stopped after 1 s'
  assert found['wall_s'] < 20
  hungry = 'x = b"1" * 5 * 10**8; time.sleep(60)'
  found = _run(hungry, zoo.Limits(30, 450))
  assert found['reason'] == 'stopped at 450 MB'
  assert found['peak_mb'] > 450


@pytest.mark.parametrize(
  ('found', 'stage', 'has', 'outcome'),
  [
    ({'stage': 'parity', 'parity': 1e-6}, 'parity', True, 'imported'),
    ({'stage': 'parity', 'parity': 1e-3}, 'latency', False, 'no parity'),
    ({'stage': 'student', 'parity': 0.0}, 'latency', False, 'student'),
    ({'stage': 'load', 'reason': 'x'}, 'latency', True, 'fails in load'),
    (
      {'stage': 'load', 'reason': 'x', 'refused': True},
      'latency',
      True,
      'refused',
    ),
    (
      {'stage': 'latency', 'parity': 0.0, 'exact': 8, 'images': 8},
      'latency',
      True,
      'exact',
    ),
    (
      {'stage': 'latency', 'parity': 0.0, 'exact': 7, 'images': 8},
      'student',
      True,
      'not exact',
    ),
  ],
)
def test_outcome(found, stage, has, outcome):
  assert zoo.has(found, stage) == has
  assert zoo.outcome(found) == outcome


def test_list():
  names = [network.name for network in zoo.networks()]
  assert len(names) == len(set(names)) == 275
  assert {name.split(':')[0] for name in names} == {
    'pytorchcv',
    'timm',
    'torchvision',
  }


def _main(monkeypatch, file, *arguments):
  """Runs the benchmark; returns the names that it would have run."""
  ran = []

  def supervise(target, args, limits):
    name, _, (*_, last), _ = args
    ran.append(name)
    return {'stage': last, 'parity': 0.0, 'wall_s': 1.0, 'peak_mb': 1}

  monkeypatch.setattr(zoo, 'supervise', supervise)
  monkeypatch.setattr(sys, 'argv', ['zoo', f'--records={file}', *arguments])
  assert zoo.main() == 0
  return ran


def test_it_goes_on_where_it_stopped(monkeypatch, tmp_path):
  file = tmp_path / 'zoo.jsonl'
  names = [network.name for network in zoo.networks()]
  assert _main(monkeypatch, file, '--stages=import', '--limit=2') == names[:2]
  assert _main(monkeypatch, file, '--stages=import', '--limit=1') == names[2:3]
  # Two further stages: those that were only imported run again.
  assert _main(monkeypatch, file, '--limit=1') == names[:1]
  assert [r['stage'] for r in records.lines(file)] == [
    'latency',
    'parity',
    'parity',
  ]
  broken = records.lines(file)[1] | {'reason': 'x'}
  zoo.replace(file, broken)
  assert _main(monkeypatch, file, '--limit=1') == names[2:3]
  assert _main(monkeypatch, file, '--limit=1', '--again') == names[1:2]
  named = '--names', names[0], '--stages=import'
  assert _main(monkeypatch, file, *named) == names[:1]
  assert len(records.lines(file)) == 3
  assert all(not records.problems(r) for r in records.lines(file))


def test_a_name_that_is_not_listed(monkeypatch, tmp_path, capsys):
  with pytest.raises(SystemExit):
    _main(monkeypatch, tmp_path / 'x.jsonl', '--names', 'timm:nothing')
  assert 'timm:nothing' in capsys.readouterr().err


def test_records_have_one_line_for_each_network():
  lines = records.lines(zoo.RECORDS)
  names = [r['name'] for r in lines]
  assert len(names) == len(set(names))
  assert set(names) <= {network.name for network in zoo.networks()}
  for record in lines:
    assert json.dumps(record)
    assert zoo.outcome(record)
