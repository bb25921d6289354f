"""Any imported network, W8A8; its weights file holds its graph.

Paper: ClusterQ, arXiv 2205.00179, with the short recipe. Generator, batch,
learning rates and length of the run follow from the network; docs/method.md
has the rules. docs/networks.md explains how to import a network.

    python -m clusterq_jax.main --config=configs/quantize.py \
        --workdir=runs/mine --config.teacher.weights=network.safetensors

Fewer bits: --config.quant.weight_bits=4. A longer or shorter run:
--config.budget=0.5. Accuracy: --config.eval.source=folder
--config.eval.path=images.
"""

import clusterq_jax as cq


def get_config():
  """Returns the short recipe for a network that a weights file holds."""
  return cq.quantize_config()
