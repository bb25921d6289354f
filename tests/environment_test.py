"""Tests the environment of the command line."""

import os
import sys

import pytest

from clusterq_jax import environment

_COMMAND = ['python', '-m', 'clusterq_jax.main', '--config=x']
_TUNABLES = 'GLIBC_TUNABLES'


@pytest.fixture
def restarts(monkeypatch, tmp_path):
  """Returns the restarts, on a kernel that gives huge pages when asked."""
  setting = tmp_path / 'enabled'
  setting.write_text('always [madvise] never\n')
  monkeypatch.setattr(environment, '_HUGE_PAGES', setting)
  for name in _TUNABLES, 'TF_CPP_MIN_LOG_LEVEL':
    monkeypatch.setenv(name, '')  # so that the test's own value is undone
    monkeypatch.delenv(name)
  monkeypatch.setattr(sys, 'orig_argv', _COMMAND)
  found = []
  monkeypatch.setattr(os, 'execv', lambda *command: found.append(command))
  return found


def test_a_command_starts_again_with_huge_pages(restarts):
  environment.prepare()
  (command,) = restarts
  assert command == (sys.executable, [sys.executable, *_COMMAND[1:]])
  assert os.environ[_TUNABLES] == 'glibc.malloc.hugetlb=1'
  environment.prepare()
  assert len(restarts) == 1


def test_a_set_variable_keeps_its_value(restarts, monkeypatch):
  monkeypatch.setenv(_TUNABLES, 'glibc.malloc.hugetlb=0')
  environment.prepare()
  assert not restarts


@pytest.mark.parametrize('setting', ['[always] madvise never', None])
def test_a_kernel_that_is_not_asked(restarts, setting):
  environment._HUGE_PAGES.unlink()
  if setting:
    environment._HUGE_PAGES.write_text(setting)
  environment.prepare()
  assert not restarts
  assert os.environ['TF_CPP_MIN_LOG_LEVEL'] == '3'


def test_a_library_is_left_alone(restarts, monkeypatch):
  monkeypatch.setattr(sys, 'orig_argv', ['python', 'train.py'])
  environment.prepare()
  assert not restarts
  assert 'TF_CPP_MIN_LOG_LEVEL' not in os.environ


def test_the_command_itself(spawn, tmp_path):
  """The config file is read by the process that has started again."""
  if not environment.malloc():
    pytest.skip('huge pages need no request here')
  config = tmp_path / 'config.py'
  config.write_text(
    'import os, sys\n'
    'import clusterq_jax as cq\n'
    f'print(os.environ[{_TUNABLES!r}], sys.argv[1:])\n'
    'get_config = cq.default_config\n'
  )
  flags = [f'--config={config}', '--mode=config']
  process = spawn('-m', 'clusterq_jax.main', *flags)
  out, error = process.communicate(timeout=300)
  assert process.returncode == 0, error
  assert out.splitlines()[0] == f'glibc.malloc.hugetlb=1 {flags}'
