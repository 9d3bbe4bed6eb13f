"""A context is filled to the item."""

from hypothesis import given
from hypothesis import strategies as st

from recycler.tasks.filling import longest_fitting


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.data())
def test_what_fits_fits_and_one_more_does_not(lengths: list[int], data: st.DataObject) -> None:
    n_least = data.draw(st.integers(1, len(lengths)))
    n_tokens = data.draw(st.integers(sum(lengths[:n_least]), sum(lengths[:n_least]) + 300))

    def build(n_items: int) -> list[int]:
        return [0] * sum((lengths * (n_items // len(lengths) + 1))[:n_items])

    n_items = longest_fitting(build, n_least, n_tokens)
    assert n_items >= n_least
    assert len(build(n_items)) <= n_tokens < len(build(n_items + 1))
