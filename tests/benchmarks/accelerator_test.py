"""The benchmark of an accelerator: its time, its records, and all of it."""

import argparse
import json
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import accelerator, common, records

_DEVICE = {'platform': 'gpu', 'device': 'A', 'count': 1}
_OTHER = _DEVICE | {'count': 8}


@pytest.fixture
def scripts(monkeypatch):
  """Returns a list of scripts that run in the place of the processes."""
  found = []

  def start(module, *arguments, folder, variables, **kwargs):
    command = [sys.executable, '-c', found.pop(0), *arguments]
    return subprocess.Popen(command, cwd=folder, **kwargs)

  monkeypatch.setattr(common, 'start', start)
  return found


@pytest.fixture
def bench(tmp_path):
  """Returns a function that makes a bench for some minutes."""

  def make(minutes=None, folder='work'):
    args = argparse.Namespace(
      smoke=False, workdir=tmp_path / folder, output=tmp_path / 'out.jsonl'
    )
    made = accelerator.Bench(args, accelerator.Call(minutes))
    made._device = _DEVICE
    return made

  return make


def _say(*pieces, then=''):
  found = [json.dumps({'piece': piece, 'ms': 1}) for piece in pieces]
  return f'import time\nfor x in {found!r}: print(x, flush=True)\n{then}'


def _pieces(file):
  return [record['piece'] for record in records.lines(file)]


def test_a_group_and_its_records(scripts, bench, tmp_path):
  made = bench()
  scripts += [_say('g-a', then='1 / 0'), _say('g-b')]
  made._group('g', ['g-a', 'g-b'])
  assert made.failed
  assert _pieces(made._own) == _pieces(tmp_path / 'out.jsonl') == ['g-a']
  made._group('g', ['g-a', 'g-b'])  # only what is missing
  assert _pieces(tmp_path / 'out.jsonl') == ['g-a', 'g-b']
  made._group('g', ['g-a', 'g-b'])
  assert not scripts
  (record, _) = records.lines(made._own)
  assert record['device'] == _DEVICE
  assert record['command'] == 'python -m benchmarks.accelerator'
  # A copy of the folder brings its records; another device starts anew.
  (tmp_path / 'out.jsonl').unlink()
  made._share()
  assert _pieces(tmp_path / 'out.jsonl') == ['g-a', 'g-b']
  other = bench(folder='other')
  other._share()
  assert other._has('g-b')
  other._device = _OTHER
  assert not other._has('g-b')


@pytest.mark.parametrize(
  'then', ['', 'import signal; signal.signal(15, signal.SIG_IGN)']
)
def test_it_stops_in_time(scripts, bench, then):
  made, start = bench(minutes=0.05), time.monotonic()
  scripts.append(_say('g-a', then=f'{then}\ntime.sleep(60)'))
  made._group('g', ['g-a', 'g-b'])
  assert time.monotonic() - start < 20
  assert made._call.stopped
  assert not made.failed
  made._group('h', ['h-a'])  # starts nothing more
  assert _pieces(made._own) == ['g-a']
  assert not made._cut.exists()  # something was measured


def test_a_piece_that_no_call_is_long_enough_for(scripts, bench, capfd):
  made = bench(minutes=0.02)
  scripts.append('import time; time.sleep(60)')
  made._group('g', ['g-a', 'g-b'])
  assert made._cut.read_text() == 'g-a\n'
  made = bench()
  scripts.append(_say('g-b'))
  made._group('g', ['g-a', 'g-b'])
  assert _pieces(made._own) == ['g-b']
  assert '== g-a: skipped: ' in capfd.readouterr().out


_RUN = """
import json, pathlib, sys
given = dict(a.lstrip('-').split('=', 1) for a in sys.argv[1:])
pathlib.Path('given.json').write_text(json.dumps(given))
folder = pathlib.Path(given['workdir'])
folder.mkdir(exist_ok=True)
(folder / 'results.json').write_text('{"wall_s": 2.5, "steps": 7, "x": 1}')
"""


def test_a_run_names_no_folder_of_this_machine(scripts, bench, tmp_path):
  made = bench()
  (made._folder / 'resnet20.safetensors').touch()
  (made._folder / 'cifar10.npz').touch()
  scripts.append(_RUN)
  made._run('paper')
  (record,) = records.lines(made._own)
  assert record['config'] == 'paper/cifar10_resnet20'
  assert (record['wall_s'], record['steps']) == (2.5, 7)
  given = json.loads((made._folder / 'given.json').read_text())
  given.pop('config')
  assert given == {
    'workdir': 'paper_cifar10_resnet20',
    'distributed': 'off',
    'config.teacher.weights': 'resnet20.safetensors',
    'config.eval.source': 'npz',
    'config.eval.path': 'cifar10.npz',
  }
  made._run('paper')  # has its record
  assert not made.failed


def test_runs_without_data(scripts, bench, monkeypatch, tmp_path, capfd):
  monkeypatch.setattr(common, 'DATA', tmp_path / 'none')
  monkeypatch.setattr(accelerator, '_SOURCE', tmp_path / 'none' / 'x.th')
  made = bench()
  made._run('paper')
  assert '== paper: skipped: needs ' in capfd.readouterr().out
  scripts.append(_RUN)
  made._run('short_recipe')
  (record,) = records.lines(made._own)
  assert record['config'] == 'fashion_mnist_resnet20'
  scripts.append('1 / 0')
  made._device = _OTHER
  (made._folder / 'fashion_mnist_resnet20' / 'results.json').unlink()
  made._run('short_recipe')
  assert made.failed


def test_pieces_have_names_of_their_own():
  whole = [p for group in accelerator.groups(False).values() for p in group]
  assert len(set(whole)) == len(whole) == 2 + 3 * 2 * 4 + 2
  tiny = [p for group in accelerator.groups(True).values() for p in group]
  assert set(tiny) < set(whole)


@pytest.mark.full
def test_all_of_it(tmp_path):
  """Stops the paper's run once, and resumes in a copy of the folder."""
  committed = records.lines(accelerator.RECORDS)

  def start(folder):
    command = ['-m', 'benchmarks.accelerator', '--smoke', f'--workdir={folder}']
    return subprocess.Popen(
      [sys.executable, *command],
      cwd=common.ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )

  first, second = tmp_path / 'first', tmp_path / 'elsewhere' / 'second'
  process, metrics = (
    start(first),
    first / 'paper_cifar10_resnet20' / 'metrics.jsonl',
  )
  end = time.monotonic() + 600
  while process.poll() is None and not metrics.exists():
    assert time.monotonic() < end
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 0, out
  assert 'run the same command again' in out
  assert 'failed' not in out
  stopped = _pieces(first / 'accelerator.jsonl')
  assert 'short_recipe' in stopped
  assert 'paper' not in stopped

  second.parent.mkdir()
  first.rename(second)
  process = start(second)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0, out
  found = records.lines(second / 'accelerator.jsonl')
  names = [record['piece'] for record in found]
  assert names[:-1] == stopped
  assert names[-1] == 'paper'
  by_name = dict(zip(names, found, strict=True))
  exact = by_name.get('exactness-imported')
  if exact:  # with onnxruntime
    assert exact['equal'] == exact['images'] > 0
    assert not exact['calibration_follows_jax']
  timed = by_name['steps-quantize-bfloat16-joint']
  assert set(timed['ms']) == {'1', '2'}
  assert timed['ms']['2']['low'] > 0
  assert by_name['paper']['steps'] == 210
  assert records.lines(accelerator.RECORDS) == committed
