"""Images and gradients of the generator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax.method.generator import Generator, upsample_conv

_BATCH, _CLASSES, _LATENT = 6, 4, 8
# Compilation takes most of the time here.
_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
_LABELS = np.array([0, 1, 2, 3, 0, 1])


def _generator(shape, conditional=False, prototypes=0):
  channels = (8, 8, 8, 4) if conditional else (8, 8, 4)
  return Generator(shape, _CLASSES, _LATENT, channels, conditional, prototypes)


def _noise(seed=0):
  return np.random.RandomState(seed).randn(_BATCH, _LATENT).astype(np.float32)


@functools.cache
def _made(shape, conditional=False, prototypes=0):
  """Returns random variables and the compiled generator."""
  generator = _generator(shape, conditional, prototypes)
  shapes = jax.eval_shape(generator.init, jax.random.key(0), _noise(), _LABELS)
  # NumPy draws the variables, because compiling `init` takes seconds.
  random = np.random.RandomState(0)
  variables = jax.tree.map(
    lambda a: 0.3 * random.randn(*a.shape).astype(a.dtype), shapes
  )
  return variables, _jit(generator.apply)


@pytest.mark.parametrize(
  ('shape', 'conditional'),
  [
    ((28, 28, 1), False),
    ((32, 32, 3), False),
    ((30, 30, 3), False),
    ((36, 32, 3), True),
  ],
)
def test_shape_and_scale(shape, conditional):
  variables, apply = _made(shape, conditional)
  x = np.asarray(apply(variables, _noise(), _LABELS))
  assert x.shape == (_BATCH, *shape)
  assert x.dtype == np.float32
  np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-4)
  np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=1e-3)
  # All pixels vary over the batch, including the borders.
  assert x.std(0).min() > 1e-3


def test_images_are_deterministic_and_independent_of_order():
  variables, apply = _made((28, 28, 1))
  x = np.asarray(apply(variables, _noise(), _LABELS))
  np.testing.assert_array_equal(apply(variables, _noise(), _LABELS), x)
  order = np.array([5, 2, 0, 4, 1, 3])
  y = apply(variables, _noise()[order], _LABELS[order])
  np.testing.assert_allclose(y, x[order], atol=1e-4)


@pytest.mark.parametrize(
  ('conditional', 'prototypes'), [(False, 0), (True, 0), (False, 3), (True, 3)]
)
def test_labels_and_noise_decide_the_image(conditional, prototypes):
  variables, apply = _made((28, 28, 1), conditional, prototypes)
  z = _noise()
  z[1] = z[0]
  # Samples 0 and 1 share noise and label. Samples 0 and 4 share the label.
  same = np.asarray(apply(variables, z, np.array([0, 0, 2, 3, 0, 1])))
  np.testing.assert_allclose(same[0], same[1], atol=1e-5)
  assert np.abs(same[0] - same[4]).max() > 0.5
  other = np.asarray(apply(variables, z, np.array([0, 1, 2, 3, 0, 1])))
  assert np.abs(other[0] - other[1]).max() > 0.5


@pytest.mark.parametrize('conditional', [False, True])
def test_every_parameter_has_a_gradient(conditional):
  variables, _ = _made((28, 28, 1), conditional)
  direction = np.random.RandomState(1).randn(_BATCH, 28, 28, 1)

  @_jit
  def gradient(variables, z, labels):
    def project(params):
      generator = _generator((28, 28, 1), conditional)
      x = generator.apply({'params': params}, z, labels)
      return jnp.sum(x * direction)

    return jax.grad(project)(variables['params'])

  found = gradient(variables, _noise(), _LABELS)
  assert set(variables) == {'params'}  # there are no running statistics
  for path, leaf in jax.tree_util.tree_leaves_with_path(found):
    assert np.all(np.isfinite(leaf)), path
    assert np.abs(leaf).max() > 1e-3, path


def test_noise_chooses_among_the_prototypes_of_the_class():
  variables, _ = _made((28, 28, 1), prototypes=3)
  generator = _generator((28, 28, 1), prototypes=3)
  z = _noise()
  z[:, 0] = [-9, -0.5, -0.4, 0.4, 0.5, 9]  # thirds end at -0.43 and 0.43

  @_jit
  def used(variables):
    # Only the chosen rows of the embedding have a gradient.
    def loss(params):
      x = generator.apply({'params': params}, z, np.full(_BATCH, 2))
      return jnp.sum(x * np.random.RandomState(1).randn(*x.shape))

    return jax.grad(loss)(variables['params'])['embedding']['embedding']

  rows = np.abs(used(variables)).max(1)
  assert rows.shape == (3 * _CLASSES,)
  np.testing.assert_array_equal(rows > 1e-6, np.isin(np.arange(12), [6, 7, 8]))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('height', 'width', 'features'), [(8, 8, 3), (9, 7, 20)]
)
def test_upsample_conv(height, width, features):
  random = np.random.RandomState(0)
  x = random.randn(2, height, width, 5).astype(np.float32)
  kernel = random.randn(3, 3, 5, features).astype(np.float32)
  g = random.randn(2, 2 * height, 2 * width, features).astype(np.float32)

  def plain(x, kernel):
    x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  y, pull = jax.vjp(upsample_conv, x, kernel)
  expected, expected_pull = jax.vjp(plain, x, kernel)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  for found, wanted in zip(pull(g), expected_pull(g), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
