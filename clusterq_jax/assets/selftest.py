"""Checks that this machine runs integer.onnx bit for bit.

    pip install numpy onnxruntime
    python selftest.py

Exit codes: 0 if the logits agree with selftest.npz in the printed mode, 1 if
they differ in every mode, 2 if a file or a package is missing.

The sessions use ONNX Runtime's default graph optimizations, which run
convolutions in integers. With graph_optimization_level = ORT_DISABLE_ALL, ONNX
Runtime computes in floats and the logits differ slightly. On Fashion-MNIST at
W4A4 they differ by up to 0.24, and none of 10,000 images changes its class.
"""

import pathlib
import sys

try:
  import numpy as np
  import onnxruntime
except ImportError as e:
  print(f'error: {e}; pip install numpy onnxruntime', file=sys.stderr)
  sys.exit(2)

here = pathlib.Path(__file__).resolve().parent
for name in ('integer.onnx', 'selftest.npz'):
  if not (here / name).exists():
    print(
      f'error: {here / name}: no such file; expected all files of the export '
      'in one folder',
      file=sys.stderr,
    )
    sys.exit(2)
expected = np.load(here / 'selftest.npz')
for mode in ('0', '1'):
  options = onnxruntime.SessionOptions()
  # '1' selects kernels that cannot saturate on x86 CPUs without VNNI.
  options.add_session_config_entry('session.x64quantprecision', mode)
  session = onnxruntime.InferenceSession(
    str(here / 'integer.onnx'), options, providers=['CPUExecutionProvider']
  )
  logits = session.run(['logits'], {'images': expected['images']})[0]
  wrong = np.any(logits != expected['logits'], axis=1)
  changed = np.argmax(logits, 1) != np.argmax(expected['logits'], 1)
  print(
    f'session.x64quantprecision={mode}: logits of {wrong.sum()} of '
    f'{len(wrong)} images differ, classes of {changed.sum()}'
  )
  if not wrong.any():
    print(
      'this machine agrees with selftest.npz, with that setting and the '
      'default graph optimizations; without them the logits differ slightly'
    )
    sys.exit(0)
sys.exit(
  'this machine differs from selftest.npz: measure its accuracy before you '
  'rely on it'
)
