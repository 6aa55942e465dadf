"""What some tests need of the machine."""

import pytest

from quietstar.backbone.compiling import find_compiler

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
