"""What a pod would do: the arithmetic, and, with libtpu, the compiler."""

import importlib.util

import jax
import pytest

from clusterq_jax.errors import InputError
from clusterq_jax.modes import dryrun


def test_collectives():
  program = """
  %all-reduce.1 = f32[64,3]{1,0:T(4,128)} all-reduce(%a), replica_groups={}
  %all-reduce.2 = (f32[8]{0:T(128)}, bf16[2,2]{1,0}) all-reduce(%b, %c)
  %x = f32[99]{0} add(%all-reduce.1, %all-reduce.1)
  ROOT %g = pred[16]{0} all-gather(%d), channel_id=7, dimensions={0}
  ROOT %h = pred[16]{0} all-gather(%d), channel_id=7, dimensions={0}
  %s = u8[4]{0} all-reduce-start(%e)
  %t = u8[4]{0} all-reduce-done(%s)
  %scalar = f32[]{:T(128)} all-reduce(%f)
  """
  assert dryrun.collectives(program) == {
    'all-gather': (1, 16),
    'all-reduce': (4, 4 * 64 * 3 + 4 * 8 + 2 * 4 + 4 + 4),
  }
  assert dryrun.collectives('') == {}


def test_time_of_collectives():
  devices = [None] * 16
  pod = dryrun.Topology('v5e', (4, 4), devices)
  # 4.5e10 bytes per second and direction, two axes, twice across.
  assert pod.collective_s(1, 9e9) == pytest.approx(0.1)
  # Small ones take their hops: two along each axis, of a microsecond.
  assert pod.collective_s(10, 8) == pytest.approx(40e-6)
  assert dryrun.Topology('v5e', (1, 1), [None]).collective_s(5, 1e9) == 0


def test_a_device_that_is_half_a_chip():
  chip = dryrun.Topology('v4', (2, 2, 1), [None] * 8).device
  assert chip.hbm == 16 * 2**30
  assert chip.flops == 2.75e14 / 2


@pytest.mark.parametrize('hbm', [1e12, 1000])
def test_fits(finished, monkeypatch, hbm):
  chip = dryrun.Chip(hbm, flops=1e9, bandwidth=1e30, link=1)
  monkeypatch.setitem(dryrun.CHIPS, 'v5e', chip)
  pod = dryrun.Topology('v5e', (1, 1), jax.devices()[:1])
  program = finished.programs['joint_step']
  need = dryrun.analyse(pod, program)
  fits = pod.holds(need)
  assert fits == (hbm == 1e12)
  rows = dict(dryrun._rows(need, pod, 1000))
  assert ('does NOT fit' in rows['memory']) != fits
  flops = program.cost_analysis()['flops']
  assert f'{flops / 1e9:.2f} GFLOP' in rows['work']
  assert rows['step'].startswith(f'{flops / 1e6:.3f} ms')  # arithmetic alone


@pytest.mark.parametrize('name', ['', 'v5e', 'v5e:4', 'h100:2x2', 'v5e:axb'])
def test_bad_topology(name):
  with pytest.raises(InputError, match=r'config\.dryrun\.topology.*v5e:16x16'):
    dryrun.topology(name)


def test_without_libtpu(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError, match='needs the package libtpu'):
    dryrun.topology('v5e:2x2')


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
