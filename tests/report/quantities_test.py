"""Descriptions of the quantities of metrics.jsonl."""

from clusterq_jax.report import quantities


def test_titles_differ():
  titles = [quantity.title for quantity in quantities.QUANTITIES.values()]
  assert len(set(titles)) == len(titles)


def test_an_unknown_quantity_is_described_by_its_key():
  assert quantities.describe('student/loss').unit == 'weighted sum'
  assert quantities.describe('new/one') == ('new/one', 'new/one', '')
