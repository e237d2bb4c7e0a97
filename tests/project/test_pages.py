"""The reader of code blocks reads what is there, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.project.pages import blocks, commands, run_python

PAGE = """# A page

```python
x = 1
```

<!-- not run: shows an error on purpose -->
```python
raise SystemExit
```

- in a list

  ```python
  if x:
      y = x + 1
  ```

```bash
# a comment
graftune train \\
    --epochs 2   # short
make demo
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE, encoding="utf-8")
    return path


def test_blocks_keep_their_order_and_lose_their_indent(page: Path) -> None:
    assert [block.text for block in blocks(page, "python")] == [
        "x = 1\n",
        "if x:\n    y = x + 1\n",
    ]


def test_python_blocks_share_one_namespace(page: Path) -> None:
    assert run_python(page)["y"] == 2


def test_commands_are_joined_and_without_comments(page: Path) -> None:
    assert commands(page) == ["graftune train --epochs 2", "make demo"]


def test_a_traceback_names_the_line_of_the_page(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("one\n\n```python\n1 / 0\n```\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError) as caught:
        run_python(path)
    assert caught.traceback[-1].lineno + 1 == 4
