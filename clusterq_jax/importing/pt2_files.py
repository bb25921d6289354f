"""Reads files of torch.export.save without torch, and without running them.

A file is a zip archive of JSON and tensors. Known are the layouts of torch 2.7
to 2.13:

  * torch 2.9 and newer: models/model.json, and each storage as raw bytes;
  * torch 2.8: the same JSON, and pickled tensors (`tensors`);
  * torch 2.7: the same members under other names.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from clusterq_jax.errors import InputError, check_archive, check_size
from clusterq_jax.importing import tensors as tensors_lib
from clusterq_jax.importing.program import (
  Call,
  Program,
  Ref,
  module_path,
  refuse_dynamic,
)
from clusterq_jax.weights.entries import join_names

_SCHEMA = 8  # major version of the JSON in torch 2.7 to 2.13
_KINDS = ('weights', 'constants')  # folders and files of tensors
_LARGEST_JSON = 2**25  # bytes; a network of 3,000 layers takes 10 MB
_HOW = (
  'save it with torch.export.save(torch.export.export(network.eval(), '
  '(torch.zeros(2, C, H, W),)), path)'
)


def read(path: str | os.PathLike[str]) -> Program:
  """Reads a file that torch.export.save wrote.

  Args:
    path: a .pt2 file of torch 2.7 or newer.

  Raises:
    InputError: the file is missing, damaged, of another format or of an
      unknown version, or it has sizes that are not fixed.
  """
  path = os.fspath(path)
  try:
    with zipfile.ZipFile(path) as archive:
      check_archive(path)
      return _read(path, archive)
  except InputError:
    raise
  except FileNotFoundError as error:
    raise InputError(f'{path}: no such file; {_HOW}') from error
  except OSError as error:
    raise InputError(f'{path}: cannot be read: {error.strerror}') from error
  except zipfile.BadZipFile as error:
    raise InputError(
      f'{path}: not a complete .pt2 file ({error}); {_HOW}'
    ) from error
  except Exception as error:  # damaged contents raise nearly every kind
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    raise InputError(f'{path}: a damaged program ({reason}); {_HOW}') from error


def _read(path: str, archive: zipfile.ZipFile) -> Program:
  names = archive.namelist()
  models = [
    name
    for name in names
    if name == 'serialized_exported_program.json'
    or (name.endswith('.json') and name.split('/')[-2:-1] == ['models'])
  ]
  if len(models) != 1:
    found = f'{len(models)} programs' if models else 'no program'
    if any('/aotinductor/' in name for name in names):
      found = 'a compiled program'
    elif any(name.endswith(('/data.pkl', '/constants.pkl')) for name in names):
      found = 'a torch checkpoint'
    raise InputError(f'{path}: found {found} of torch.export; {_HOW}')
  model = _json(path, archive, models[0])
  version = model['schema_version']['major']
  if version != _SCHEMA:
    raise InputError(
      f'{path}: schema {version!r} of torch {model.get("torch_version")}, '
      f'expected schema {_SCHEMA}: export with torch 2.7 to 2.13'
    )
  module = model['graph_module']
  graph = module['graph']
  shapes = _shapes(path, graph['tensor_values'])
  weights, inputs = _inputs(module['signature']['input_specs'])
  outputs = [_output(spec) for spec in module['signature']['output_specs']]
  tensors = _tensors(path, archive, models[0], set(weights.values()))
  return Program(
    path,
    tuple(map(_call, graph['nodes'])),
    tuple(inputs),
    tuple(name for name in outputs if name is not None),
    shapes,
    weights,
    tensors,
  )


def _json(path: str, archive: zipfile.ZipFile, name: str) -> Any:
  size = archive.getinfo(name).file_size
  if size > _LARGEST_JSON:
    raise InputError(
      f'{path}: {name} takes {size:,} bytes, expected at most {_LARGEST_JSON:,}'
    )
  return json.loads(archive.read(name))


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise TypeError(f'expected a text, found {value!r:.50}')
  return value


def _size(value: Any) -> int:
  if type(value) is not int or not 0 <= value < 2**40:
    raise ValueError(f'expected a size, found {value!r:.50}')
  return value


def _shapes(path: str, values: Mapping) -> dict[str, tuple[int, ...]]:
  shapes = {}
  for name, meta in values.items():
    if any('as_expr' in size for size in meta['sizes']):
      refuse_dynamic(path, name)
    shapes[name] = tuple(_size(size['as_int']) for size in meta['sizes'])
  return shapes


def _inputs(specs: list) -> tuple[dict[str, str], list[str]]:
  """Returns the weights' keys by name, and the names of the user's inputs."""
  weights, inputs = {}, []
  for spec in specs:
    ((kind, value),) = spec.items()
    if kind in ('parameter', 'buffer', 'tensor_constant'):
      key = _text(value[f'{kind}_name'])
      weights[_text(value['arg']['name'])] = key
    elif kind == 'user_input':
      argument = value['arg']
      # An input that is no tensor is named by what it is.
      inputs.append(
        _text(argument['as_tensor']['name'])
        if 'as_tensor' in argument
        else str(next(iter(argument)))
      )
    else:
      inputs.append(kind)
  return weights, inputs


def _output(spec: Mapping) -> str | None:
  ((kind, value),) = spec.items()
  if kind != 'user_output':
    return None if kind == 'token' else kind
  argument = value['arg']
  if 'as_none' in argument:
    return None
  if 'as_tensor' not in argument:
    return str(next(iter(argument)))
  return _text(argument['as_tensor']['name'])


def _call(node: Mapping) -> Call:
  outputs: list[str] = []
  for output in node['outputs']:
    if 'as_tensor' in output:
      outputs.append(_text(output['as_tensor']['name']))
    elif 'as_tensors' in output:
      outputs += [_text(each['name']) for each in output['as_tensors']]
  return Call(
    _text(node['target']).removeprefix('torch.ops.'),
    {_text(i['name']): _operand(i['arg']) for i in node['inputs']},
    tuple(outputs),
    _place(_text(node['metadata'].get('nn_module_stack', ''))),
  )


def _place(stack: str) -> tuple[tuple[str, str], ...]:
  """Splits 'key,path,class;key,path,class'; a class may hold commas."""
  rows = [row.split(',', 2) for row in stack.split(';')]
  return tuple((module_path(r[1]), r[2]) for r in rows if len(r) == 3)


def _operand(argument: Mapping) -> Any:
  """Returns an operand as plain data; what is none is named as a text."""
  ((kind, value),) = argument.items()
  if kind == 'as_none':
    return None
  if kind == 'as_tensor':
    return Ref(_text(value['name']))
  if kind == 'as_tensors':
    return [Ref(_text(each['name'])) for each in value]
  if kind in ('as_optional_tensor', 'as_optional_tensors'):
    each = value if isinstance(value, list) else [value]
    refs = [
      Ref(_text(e['as_tensor']['name'])) if 'as_tensor' in e else None
      for e in each
    ]
    return refs if isinstance(value, list) else refs[0]
  if kind in ('as_int', 'as_bool', 'as_string'):
    expected = {'as_int': int, 'as_bool': bool, 'as_string': str}[kind]
    if type(value) is not expected:
      raise TypeError(f'{kind} is {value!r:.50}')
    return value
  if kind == 'as_scalar_type' and value in tensors_lib.DTYPES:
    return f'torch.{tensors_lib.DTYPES[value].name}'
  if kind == 'as_float':
    return float(value)  # infinite ones are texts
  if kind in ('as_ints', 'as_bools', 'as_floats'):
    return [_operand({kind[:-1]: each}) for each in value]
  if kind == 'as_sym_ints' and all('as_int' in each for each in value):
    return [_operand({'as_int': each['as_int']}) for each in value]
  return kind


def _tensors(
  path: str, archive: zipfile.ZipFile, model: str, wanted: set[str]
) -> dict[str, np.ndarray]:
  """Reads the weights with these keys; floats become float32."""
  root, _, name = model.removesuffix('.json').rpartition('models/')
  if not root and '/' not in model:
    pickles = ['serialized_state_dict.pt', 'serialized_constants.pt']
  else:
    pickles = [f'{root}data/{kind}/{name}.pt' for kind in _KINDS]
  tensors: dict[str, np.ndarray] = {}
  if pickles[0] in archive.namelist():
    for member in pickles:
      tensors |= tensors_lib.read_pickled(archive.read(member))
  else:
    for kind in _KINDS:
      tensors |= _raw(path, archive, f'{root}data/{kind}/', name, kind, wanted)
  if missing := wanted - tensors.keys():
    raise InputError(
      f'{path}: {len(missing)} tensors are missing '
      f'({join_names(sorted(missing))}); {_HOW}'
    )
  return {key: tensors[key] for key in wanted}


def _raw(
  path: str,
  archive: zipfile.ZipFile,
  folder: str,
  name: str,
  kind: str,
  wanted: set[str],
) -> dict[str, np.ndarray]:
  """Reads the tensors of a folder of storages; several can share a storage."""
  entries = _json(path, archive, f'{folder}{name}_{kind}_config.json')['config']
  tensors: dict[str, np.ndarray] = {}
  storages: dict[str, bytes] = {}
  taken = 0
  for key in sorted(wanted & entries.keys()):
    entry, meta = entries[key], entries[key]['tensor_meta']
    if entry['use_pickle']:
      raise ValueError(f'tensor {key} is of a class of its own')
    if meta['dtype'] not in tensors_lib.DTYPES:
      raise ValueError(f'tensor {key} is of type {meta["dtype"]!r}')
    member = folder + _text(entry['path_name'])
    if member not in storages:
      storages[member] = archive.read(member)
    tensors[key] = tensors_lib.strided(
      key,
      storages[member],
      tensors_lib.DTYPES[meta['dtype']],
      [_size(size['as_int']) for size in meta['sizes']],
      [_size(stride['as_int']) for stride in meta['strides']],
      _size(meta['storage_offset']['as_int']),
    )
    taken += tensors[key].nbytes
    check_size(path, taken)
  return tensors
