"""The folder of compiled programs."""

import pathlib

import jax
import pytest

from clusterq_jax.runtime import compilation_cache


@pytest.fixture(autouse=True)
def _settings():
  """Restores JAX's settings."""
  names = (
    'jax_compilation_cache_dir',
    'jax_compilation_cache_max_size',
    'jax_persistent_cache_min_compile_time_secs',
  )
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def _folder(monkeypatch, where) -> str | None:
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(where))
  compilation_cache.enable()
  return jax.config.jax_compilation_cache_dir


def test_each_kind_of_cpu_has_a_folder(tmp_path, monkeypatch, capsys):
  found = []
  for i, flags in enumerate(('flags : avx2', 'flags : avx2 avx512f')):
    info = tmp_path / str(i)
    info.write_text(f'processor : {i}\n{flags}\n')
    monkeypatch.setattr(compilation_cache, '_CPU_INFO', info)
    found.append(_folder(monkeypatch, tmp_path / 'cache'))
    info.write_text(f'cpu MHz : 2100.{i}\n{flags}\n')
    assert _folder(monkeypatch, tmp_path / 'cache') == found[-1]
  assert found[0] != found[1]
  assert {pathlib.Path(f).parent for f in found} == {tmp_path / 'cache'}
  assert jax.config.jax_compilation_cache_max_size == 2**31
  assert capsys.readouterr().err == ''


def test_default_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  compilation_cache.enable()
  folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
  assert folder.parent == tmp_path / '.cache' / 'clusterq-jax'
  assert folder.is_dir()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
  (tmp_path / 'file').touch()
  assert _folder(monkeypatch, tmp_path / 'file' / 'cache') is None
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(str(tmp_path / 'file' / 'cache'))
  assert 'JAX_COMPILATION_CACHE_DIR' in line


def test_empty_variable_turns_the_cache_off(monkeypatch, capsys):
  assert _folder(monkeypatch, '') is None
  assert capsys.readouterr().err == ''


def test_incomplete_programs_are_removed(tmp_path, monkeypatch):
  folder = pathlib.Path(_folder(monkeypatch, tmp_path))
  for name in ('whole-cache', 'whole-atime', 'killed-cache'):
    (folder / name).touch()
  _folder(monkeypatch, tmp_path)
  left = {file.name for file in folder.iterdir() if file.name[0] != '.'}
  assert left == {'whole-cache', 'whole-atime'}


def test_buckets_are_left_to_jax(monkeypatch):
  assert _folder(monkeypatch, 'gs://bucket/cache') == 'gs://bucket/cache'
