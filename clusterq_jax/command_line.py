"""Help texts of the two command lines, `main` and `convert`."""

import textwrap

from absl import flags

_HELP = ('--help', '-help', '-h')


def wants_help(argv: list[str]) -> bool:
  """Tells whether an argument asks for help."""
  return any(argument in _HELP for argument in argv[1:])


def describe_flags(one: str) -> str:
  """Describes the flags of a module, at most 80 columns per line.

  Args:
    one: name of a flag that the module defines.
  """
  module = flags.FLAGS.find_module_defining_flag(one)
  wrapper = textwrap.TextWrapper(
    width=80, initial_indent=6 * ' ', subsequent_indent=6 * ' '
  )
  return '\n'.join(
    f'  --{flag.name}{f" ({flag.default})" if flag.default else ""}\n'
    f'{wrapper.fill(flag.help)}'
    for flag in flags.FLAGS.flags_by_module_dict()[str(module)]
    if '.' not in flag.name
  )
