"""The kit's assertions say what they compared."""

import pytest

pytest.register_assert_rewrite("parsekit")
