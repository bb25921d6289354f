"""Trains the embedded teacher: ResNet-20 on Fashion-MNIST.

This is the only module that trains on real data. It trains on 55,000 of the
60,000 training images; the last 5,000 are the dev split. It evaluates the
10,000 test images once, after the last step.

    python -m clusterq_jax.pretrain --data=/usr/share/datasets/fashion-mnist \
        --output=fashion_mnist_resnet20.safetensors

The data folder holds the four IDX files of Fashion-MNIST. They come from the
Debian package dataset-fashion-mnist or from
https://github.com/zalandoresearch/fashion-mnist. Training takes about 40
minutes on two cores.
"""

import dataclasses
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import app, flags

from clusterq_jax import data, weights
from clusterq_jax.errors import InputError
from clusterq_jax.layers import float_layers
from clusterq_jax.method import losses
from clusterq_jax.models import registry
from clusterq_jax.models.graph import trace
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.runtime import evaluation

DEV_IMAGES = 5_000
ARCH = 'resnet20'

_DATA = flags.DEFINE_string(
  'data', None, 'Folder with the IDX files.', required=True
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Safetensors file to write.', required=True
)
_EPOCHS = flags.DEFINE_integer('epochs', 10, 'Passes over the images.')
_BATCH = flags.DEFINE_integer('batch_size', 128, 'Images per step.')
_SEED = flags.DEFINE_integer(
  'seed', 0, 'Seed of weights, order of the images and augmentation.'
)


def augment(key: jax.Array, x: jax.Array, shift: int = 2) -> jax.Array:
  """Shifts and flips each image at random.

  Args:
    key: PRNG key.
    x: images, float32 [B, H, W, C].
    shift: largest shift in each direction, in pixels.

  Returns:
    float32 [B, H, W, C].
  """
  size, flip_key, shift_key = x.shape, *jax.random.split(key)
  flip = jax.random.bernoulli(flip_key, 0.5, (size[0], 1, 1, 1))
  x = jnp.where(flip, x[:, :, ::-1], x)
  x = jnp.pad(x, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
  starts = jax.random.randint(shift_key, (size[0], 2), 0, 2 * shift + 1)

  def crop(image, yx):
    return jax.lax.dynamic_slice(image, (*yx, 0), size[1:])

  return jax.vmap(crop)(x, starts)


def _train_step(network, optimizer, prep: Preprocessing):
  """Returns a compiled step (state, key, pixels, labels) -> state.

  The state is (variables, optimizer state, loss), and the step donates it.
  Pixels are uint8 [B, H, W, C], labels int [B].
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, key, pixels, labels):
    variables, opt_state, _ = state
    x = augment(key, prep.normalize(pixels))

    def loss_fn(params):
      logits, new = network.apply(
        {**variables, 'params': params}, x, mutable=['batch_stats']
      )
      return losses.inception_loss(logits, labels), new['batch_stats']

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      variables['params']
    )
    updates, opt_state = optimizer.update(grads, opt_state, variables['params'])
    params = optax.apply_updates(variables['params'], updates)
    return {'params': params, 'batch_stats': batch_stats}, opt_state, loss

  return step


def _optimizer(steps: int) -> optax.GradientTransformation:
  """Returns SGD with Nesterov momentum and a one-cycle learning rate.

  Weight decay applies to kernels only.

  Args:
    steps: number of steps of the whole training.
  """
  kernels = functools.partial(jax.tree.map, lambda a: a.ndim > 1)
  rate = optax.cosine_onecycle_schedule(steps, 0.2, 0.2)
  return optax.chain(
    optax.add_decayed_weights(5e-4, mask=kernels),
    optax.sgd(rate, 0.9, nesterov=True),
  )


def _preprocessing(images: np.ndarray) -> Preprocessing:
  """Returns the preprocessing that normalises uint8 images [N, H, W, 1]."""
  scaled = images / 255
  return Preprocessing(
    image_size=images.shape[1:3],
    mean=(round(float(scaled.mean()), 4),),
    std=(round(float(scaled.std()), 4),),
    channel_order='grey',
  )


def main(argv: list[str]) -> None:
  """Trains and saves the teacher and prints its accuracy.

  Raises:
    InputError: the images cannot be read, or the output is not a new file.
  """
  del argv
  folder, output = pathlib.Path(_DATA.value), pathlib.Path(_OUTPUT.value)
  train = data.read_fashion_mnist(folder, 'train')
  test = data.read_fashion_mnist(folder, 't10k')
  if not output.parent.is_dir() or output.exists():
    raise InputError(
      f'--output={output}: expected a new file in an existing folder'
    )
  images, labels = (a[:-DEV_IMAGES] for a in train)
  dev = data.Images(*(a[-DEV_IMAGES:] for a in train))
  prep = _preprocessing(images)
  build = registry.builder(ARCH, num_classes=10)
  network = build(float_layers.layer_set(train=True))
  teacher = build(float_layers.layer_set())
  seed = jax.random.key(_SEED.value)
  variables = jax.jit(network.init)(seed, jnp.zeros((1, *prep.shape)))
  epoch_steps = len(images) // _BATCH.value
  steps = _EPOCHS.value * epoch_steps
  optimizer = _optimizer(steps)
  step = _train_step(network, optimizer, prep)

  @jax.jit
  def logits(variables, pixels):
    return teacher.apply(variables, prep.normalize(pixels))

  def top1(split: data.Images) -> float:
    predict = functools.partial(logits, state[0])
    answers = evaluation.predictions([predict], split.images, 500)[0]
    return evaluation.percent(answers == split.labels)

  state = (variables, optimizer.init(variables['params']), jnp.zeros(()))
  rng = np.random.default_rng(_SEED.value)
  start = time.time()
  with tqdm.tqdm(total=steps, unit='step', mininterval=1) as bar:
    for epoch in range(_EPOCHS.value):
      order = rng.permutation(len(images))
      for rows in np.split(order[: epoch_steps * _BATCH.value], epoch_steps):
        key = jax.random.fold_in(seed, bar.n)
        state = step(state, key, images[rows], labels[rows])
        bar.update()
      bar.write(
        f'epoch {epoch + 1}: loss {state[2]:.3f}, dev top-1 {top1(dev):.2f}'
      )
  trained = jax.tree.map(np.asarray, state[0])
  weights.save(
    output,
    trace(build),
    trained,
    dataclasses.asdict(prep),
    tuple(data.FASHION_MNIST_CLASSES),
    arch=ARCH,
  )
  print(
    f'{output}: dev top-1 {top1(dev):.2f}, test top-1 {top1(test):.2f}, '
    f'{time.time() - start:.0f} s'
  )


if __name__ == '__main__':
  try:
    app.run(main)
  except InputError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(2)
