"""The package itself: what `import refalign` promises."""

import refalign


def test_every_public_name_is_there():
    missing = [name for name in refalign.__all__ if getattr(refalign, name, None) is None]
    assert missing == []
