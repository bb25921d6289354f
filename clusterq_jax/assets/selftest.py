"""Does this machine run integer.onnx bit for bit? Needs numpy, onnxruntime.

    python selftest.py

Exit code 0: yes, perhaps in the mode that is printed; 1: no; 2: a file is not
there. Sessions are made with ONNX Runtime's default graph optimizations, which
run convolutions in integers. With graph_optimization_level = ORT_DISABLE_ALL it
computes in floats: logits differ a little (on Fashion-MNIST at W4A4 by up to
0.24, and the class of none of 10,000 images).
"""

import pathlib
import sys

import numpy as np
import onnxruntime

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
  # '1': kernels that cannot saturate, on x86 without VNNI.
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
      'this machine agrees, with that setting and the default graph '
      'optimizations; without them logits differ a little'
    )
    sys.exit(0)
sys.exit('this machine differs: measure its accuracy before you rely on it')
