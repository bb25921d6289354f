"""ClusterQ-JAX: data-free quantization of image classifiers.

from clusterq_jax import load_student, quantize
results = quantize(config, 'runs/mine')
student = load_student('runs/mine')
logits = student.logits(images)
"""

from clusterq_jax.student import load as load_student
from clusterq_jax.train import evaluate, quantize

__all__ = ['evaluate', 'load_student', 'quantize']
