"""Tests --mode=dryrun with the compiler of libtpu."""

import importlib.util

import pytest


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs libtpu'
)
@pytest.mark.parametrize('batch', [8, 6])
def test_for_real(spawn, tiny_config_file, batch):
  process = spawn(
    '-m',
    'clusterq_jax.main',
    '--mode=dryrun',
    f'--config={tiny_config_file}',
    '--config.dryrun.topology=v5e:2x2',
    f'--config.schedule.batch_size={batch}',
    '--config.schedule.warmup_steps=0',
    '--config.schedule.generator_steps=0',
    '--config.schedule.student_steps=0',
  )
  out, error = process.communicate(timeout=600)
  if batch == 6:
    assert process.returncode == 2
    assert 'batch_size=6 does not divide among 4 devices' in error
    return
  assert process.returncode == 0, error
  assert out.startswith('v5e:2x2: 4 devices (TPU v5 lite), batch 8.')
  assert 'joint_step' in out
  assert 'all-reduce' in out
  assert out.count(': fits') == 2
