from __future__ import annotations

from typing import Any

import pytest

from traces.plain_name import check_plain_name


@pytest.mark.parametrize("name", ["prose-000", "a", "A.b_c-9", "x" * 200])
def test_a_plain_file_name_is_taken(name: str) -> None:
    check_plain_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/etc/passwd", "../up", "a/b", "a\\b", "a b", "a\n", "-a", ".hidden", "x" * 201, "é", None, 3],
)
def test_whatever_could_lead_elsewhere_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=r"the prompt name .* must be at most 200 letters"):
        check_plain_name(name)
