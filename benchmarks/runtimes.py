"""Runs ONNX files in ONNX Runtime and, where it is installed, OpenVINO."""

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]


def onnx_runtime(file: pathlib.Path, threads: int = 0, mode: str = '0') -> Run:
  """Returns images -> logits.

  Args:
    file: the network.
    threads: 0 for as many as the runtime likes.
    mode: of its kernels, x64quantprecision.
  """
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  options.add_session_config_entry('session.x64quantprecision', mode)
  session = onnxruntime.InferenceSession(
    str(file), options, providers=['CPUExecutionProvider']
  )
  return lambda images: session.run(None, {'images': images})[0]


def openvino(file: pathlib.Path, threads: int = 0) -> Run:
  """Returns images -> logits; threads: see `onnx_runtime`."""
  import openvino as ov

  # By default it uses bfloat16 for what is not in integers, if the CPU can.
  settings: dict[str, Any] = {'INFERENCE_PRECISION_HINT': 'f32'}
  if threads:
    settings |= {'INFERENCE_NUM_THREADS': threads, 'NUM_STREAMS': 1}
  compiled = ov.Core().compile_model(str(file), 'CPU', settings)
  return lambda images: compiled(images)[0]


def installed() -> dict[str, Callable[..., Run]]:
  """Returns the runtimes that are installed, by name and version."""
  import onnxruntime

  found = {f'ONNX Runtime {onnxruntime.__version__}': onnx_runtime}
  if importlib.util.find_spec('openvino'):
    import openvino as ov

    found[f'OpenVINO {ov.__version__.split("-")[0]}'] = openvino
  return found
