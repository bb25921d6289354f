"""The one exception that means: the user gave something that cannot be used.

`main` turns it into one line on stderr and exit code 2. Everything else that
is raised is a defect and keeps its traceback.
"""


class InputError(ValueError):
  """Bad user input: a file, a flag or a config value.

  The message is a single line that names the input, what was found and what
  was expected.
  """
