"""Tests the commands of the launch scripts and runs the Slurm script."""

import os
import pathlib
import shutil
import subprocess

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_FLAGS = '--config=configs/a.py', '--workdir=/mnt/b/my run'


def _launch(root, script, *arguments, **env):
  return subprocess.run(
    [root / 'launch' / script, *arguments],
    env={**os.environ, **env},
    capture_output=True,
    text=True,
    timeout=60,
  )


@pytest.mark.parametrize(
  ('script', 'arguments', 'expected'),
  [
    (
      'local.sh',
      (),
      f"{_ROOT}/.venv/bin/python -m clusterq_jax.main --config=configs/a.py '"
      "--workdir=/mnt/b/my run'\n",
    ),
    (
      'tpu_pod.sh',
      ('pod', 'us-west4-b'),
      'git archive --prefix=clusterq-jax/ --output=/tmp/clusterq-jax.tar.gz '
      'HEAD\n'
      'gcloud compute tpus tpu-vm scp /tmp/clusterq-jax.tar.gz '
      'pod:clusterq-jax.tar.gz --zone=us-west4-b --worker=all\n'
      'gcloud compute tpus tpu-vm ssh pod --zone=us-west4-b --worker=all '
      "'--command=tar -xzf clusterq-jax.tar.gz && cd clusterq-jax && "
      'launch/setup.sh && .venv/bin/python -m pip install -q -e '
      r"'\''.[tpu,gcs]'\'' && exec launch/local.sh --config=configs/a.py "
      r"--workdir=/mnt/b/my\ run'" + '\n',
    ),
    (
      'slurm.sh',
      ('2', '8'),
      f'sbatch --job-name=clusterq-jax --chdir={_ROOT} --nodes=2 '
      '--ntasks-per-node=8 --gpus-per-node=8 --signal=TERM@120 --requeue '
      "--open-mode=append '--wrap=exec srun --kill-on-bad-exit=1 "
      r"launch/local.sh --config=configs/a.py --workdir=/mnt/b/my\ run'" + '\n',
    ),
    (
      'gke.sh',
      ('cluster', 'v5litepod-16', 'job'),
      'xpk workload create --cluster=cluster --workload=job '
      '--tpu-type=v5litepod-16 --num-slices=1 --base-docker-image=python:3.12 '
      f"--script-dir={_ROOT} --max-restarts=10 '--command=rm -rf .venv && "
      'launch/setup.sh && .venv/bin/python -m pip install -q -e '
      r"'\''.[tpu,gcs]'\'' && exec launch/local.sh --config=configs/a.py "
      r"--workdir=/mnt/b/my\ run'" + '\n',
    ),
  ],
)
def test_dry_run(script, arguments, expected):
  done = _launch(_ROOT, script, '--dry-run', *arguments, *_FLAGS)
  assert (done.returncode, done.stdout, done.stderr) == (0, expected, '')


@pytest.mark.parametrize('script', ['tpu_pod.sh', 'slurm.sh', 'gke.sh'])
def test_missing_arguments(script):
  done = _launch(_ROOT, script, 'one')
  assert done.returncode == 2
  assert done.stderr.startswith(f'usage: launch/{script} [--dry-run] ')
  assert done.stderr.count('\n') == 1


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='no shellcheck')
def test_shellcheck():
  scripts = sorted((_ROOT / 'launch').glob('*.sh'))
  done = subprocess.run(['shellcheck', '-x', *scripts], capture_output=True)
  assert done.returncode == 0, done.stdout.decode()


# Fake Slurm commands, as far as slurm.sh uses them. The fake Python of .venv
# prints its arguments.
_SBATCH = """
for option in "$@"; do
  case "$option" in
    --chdir=*) cd -- "${option#*=}" ;;
    --wrap=*) wrapped="${option#*=}" ;;
  esac
done
exec bash -c "$wrapped"
"""
_SRUN = """
shift
for i in 0 1; do
  SLURM_JOB_ID=7 SLURM_NTASKS=2 SLURM_PROCID=$i "$@" &
done
wait
"""
_PYTHON = r"""
if [[ "$2" == clusterq_jax.main ]]; then
  # Two tasks print at the same time, so each prints in one call.
  echo "$(printf '<%s>' "$SLURM_PROCID/$SLURM_NTASKS" \
    "$JAX_COMPILATION_CACHE_DIR" "$@")"
fi
"""


def test_slurm_starts_every_task(tmp_path):
  root = tmp_path / 'root'
  shutil.copytree(_ROOT / 'launch', root / 'launch')
  for name in ('requirements.txt', 'pyproject.toml'):
    (root / name).touch()
  (root / '.venv' / 'bin').mkdir(parents=True)
  for path, text in (
    (tmp_path / 'sbatch', _SBATCH),
    (tmp_path / 'srun', _SRUN),
    (root / '.venv' / 'bin' / 'python', _PYTHON),
  ):
    path.write_text(f'#!/usr/bin/env bash\n{text}')
    path.chmod(0o755)
  done = _launch(
    root,
    'slurm.sh',
    '1',
    '2',
    *_FLAGS,
    PATH=f'{tmp_path}:{os.environ["PATH"]}',
    JAX_COMPILATION_CACHE_DIR='/cache',
  )
  assert done.returncode == 0, done.stderr
  assert sorted(done.stdout.splitlines()) == [
    f'<{i}/2></cache><-m><clusterq_jax.main><--config=configs/a.py>'
    '<--workdir=/mnt/b/my run>'
    for i in range(2)
  ]
