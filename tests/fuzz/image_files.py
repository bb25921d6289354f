"""Sound and hostile images, and hostile rows of a labels.csv."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.fuzz.mutations import Random, pick


@functools.cache
def _png(width: int, height: int, pixels: bytes = b'') -> bytes:
  """A grey PNG; without pixels all are black, whatever the size."""

  def chunk(name: bytes, contents: bytes) -> bytes:
    crc = zlib.crc32(name + contents)
    return (
      struct.pack('>I', len(contents))
      + name
      + contents
      + struct.pack('>I', crc)
    )

  head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
  squeeze = zlib.compressobj(1)
  body = [squeeze.compress(pixels)]
  if not pixels:
    rows = bytes(width + 1)
    body += [squeeze.compress(rows) for _ in range(min(height, 10_000))]
  body.append(squeeze.flush())
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', head)
    + chunk(b'IDAT', b''.join(body))
    + chunk(b'IEND', b'')
  )


# Sizes that lie, and bombs that do not.
PNGS = (
  lambda: _png(2**31 - 1, 2**31 - 1, b'\0'),
  lambda: _png(2**31, 1, b'\0'),
  lambda: _png(0, 0, b'\0'),
  lambda: _png(13_000, 13_000),
  lambda: _png(10_000, 9_000),
  lambda: _png(1, 10_000),
  lambda: _png(2_000_000, 1),
  lambda: _png(80_000_000, 1),
  lambda: (
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n'
    b'(../escaped) (w) file closefile showpage\n'
  ),
)
FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'PPM', 'TIFF', 'WEBP', 'ICO', 'TGA')


def picture(random: Random, kind: str) -> bytes:
  """A sound image file, of this format."""
  out = io.BytesIO()
  mode = pick(random, ['RGB', 'L', 'P', '1', 'RGBA', 'I;16'])
  mode = mode if kind in ('PNG', 'TIFF') else 'RGB'
  side = int(random.integers(8, 30))
  pixels = random.integers(0, 256, (side, side, 3), np.uint8)
  image = Image.fromarray(pixels)
  if mode == 'I;16':
    image = Image.fromarray(pixels[..., 0].astype(np.uint16))
  else:
    image = image.convert(mode)
  image.save(out, kind)
  return out.getvalue()


ROWS = (
  'file,label',
  'a.png,0',
  'b.png,3',
  'a.png,' + '9' * 5000,
  'a.png,99999999999',
  'a.png,-1',
  'a.png,1.5',
  'a.png,²',
  'a.png,٣',
  'a.png,',
  ',1',
  '../../secret.png,1',
  '/dev/zero,1',
  '/dev/null,1',
  'images,1',
  'a\x00b.png,1',
  'x' * 200_000 + ',1',
  '"unclosed,1',
  'a.png,1,2,3',
  '\udc80,1',
)
