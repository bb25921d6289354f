"""Tests the roofline estimates and the refused topologies."""

import importlib.util

import jax
import pytest

from clusterq_jax.errors import InputError
from clusterq_jax.modes import dryrun
from clusterq_jax.runtime import roofline


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
  assert roofline.collectives(program) == {
    'all-gather': (1, 16),
    'all-reduce': (4, 4 * 64 * 3 + 4 * 8 + 2 * 4 + 4 + 4),
  }
  assert roofline.collectives('') == {}


def test_time_of_collectives():
  devices = [None] * 16
  pod = roofline.Topology('v5e', (4, 4), devices)
  # Every byte crosses twice; two axes carry 4.5e10 bytes/s per direction.
  assert pod.collective_s(1, 9e9) == pytest.approx(0.1)
  # Small ones take the time of their hops: two per axis, 1 us each.
  assert pod.collective_s(10, 8) == pytest.approx(40e-6)
  assert roofline.Topology('v5e', (1, 1), [None]).collective_s(5, 1e9) == 0


def test_a_device_that_is_half_a_chip():
  chip = roofline.Topology('v4', (2, 2, 1), [None] * 8).device
  assert chip.hbm == 16 * 2**30
  assert chip.flops == 2.75e14 / 2


@pytest.mark.parametrize('hbm', [1e12, 1000])
def test_fits(finished, monkeypatch, hbm):
  chip = roofline.Chip(hbm, flops=1e9, bandwidth=1e30, link=1)
  monkeypatch.setitem(roofline.CHIPS, 'v5e', chip)
  pod = roofline.Topology('v5e', (1, 1), jax.devices()[:1])
  program = finished.programs['joint_step']
  need = roofline.analyse(pod, program)
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
    roofline.topology(name)


def test_without_libtpu(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError, match='needs the package libtpu'):
    roofline.topology('v5e:2x2')
