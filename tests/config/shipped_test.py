"""Shipped configs, found by name."""

import pathlib

import pytest

from clusterq_jax.config import shipped
from clusterq_jax.errors import InputError


def test_a_name_finds_the_file_from_any_folder(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  for name in shipped.names():
    path = pathlib.Path(shipped.find(name))
    assert path.is_absolute()
    assert path.name == f'{pathlib.Path(name).name}.py'
    assert 'get_config' in path.read_text()
  assert 'quantize' in shipped.names()
  assert 'networks/resnet20_variant' not in shipped.names()


def test_a_path_stays(monkeypatch, tmp_path):
  (tmp_path / 'mine.py').write_text('')
  monkeypatch.chdir(tmp_path)
  assert shipped.find('mine.py') == 'mine.py'
  # The caller's own file, although a shipped config has its name.
  (tmp_path / 'resnet18.py').write_text('')
  assert shipped.find('resnet18.py') == 'resnet18.py'


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ('resnet1', r'did you mean --config=resnet18\?.*paper/resnet50'),
    ('absent.py', 'no such file; '),
    ('../configs/resnet18', 'no such file'),
    ('configs/cifar10_resnet20.py', 'moved to --config=paper/cifar10_resnet20'),
    ('cifar10_resnet20', '--config=cifar10_resnet20_fast'),
    ('cifar100_resnet20', 'moved to --config=paper/cifar100_resnet20'),
  ],
)
def test_what_is_not_there(config, message):
  with pytest.raises(InputError, match=message):
    shipped.find(config)
