"""Help texts of the two command lines, `main` and `convert`."""

from absl import flags

_HELP = ('--help', '-help', '-h')


def wants_help(argv: list[str]) -> bool:
  """Tells whether an argument asks for help."""
  return any(argument in _HELP for argument in argv[1:])


def describe_flags(one: str) -> str:
  """Describes the flags of the module that defines the flag `one`."""
  module = flags.FLAGS.find_module_defining_flag(one)
  return '\n'.join(
    f'  --{flag.name}{f" ({flag.default})" if flag.default else ""}\n'
    f'      {flag.help}'
    for flag in flags.FLAGS.flags_by_module_dict()[str(module)]
    if '.' not in flag.name
  )
