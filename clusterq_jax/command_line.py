"""What the two command lines, `main` and `convert`, share."""

from absl import flags

_HELP = ('--help', '-help', '-h')


def wants_help(argv: list[str]) -> bool:
  """Whether an argument asks for help."""
  return any(argument in _HELP for argument in argv[1:])


def describe_flags(one: str) -> str:
  """The flags of the module that defines the flag `one`, with their meaning."""
  module = flags.FLAGS.find_module_defining_flag(one)
  return '\n'.join(
    f'  --{flag.name}{f" ({flag.default})" if flag.default else ""}\n'
    f'      {flag.help}'
    for flag in flags.FLAGS.flags_by_module_dict()[str(module)]
    if '.' not in flag.name
  )
