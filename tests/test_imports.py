"""What stands in a module's place while torch and transformers are imported."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarm.imports import StandIn, _Within

STARTED = """
import sys
from swarm.imports import StandIn, import_lightly
import_lightly("swarm.model")
assert "sympy" not in sys.modules
assert isinstance(sys.modules["torch._dynamo"], StandIn)
import torch
weight = torch.nn.Parameter(torch.ones(1))
weight.grad = torch.ones(1)
torch.optim.AdamW([weight]).step()
from transformers import masking_utils
assert isinstance(sys.modules["torch._dynamo"], StandIn)
with masking_utils.TransformGetItemToIndex():
    assert torch.ones(3)[torch.tensor(1)] == 1
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
assert "sympy" in sys.modules
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with a module in it, and stand-ins for both."""
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "__init__.py").write_text("label = 'the real one'\n")
    (tmp_path / "shelf" / "book.py").write_text("times = globals().get('times', 0) + 1\ntitle = 'read'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [_Within(), *sys.meta_path])
    for name in ("shelf", "shelf.book"):
        monkeypatch.setitem(sys.modules, name, StandIn(name, {"known": 1}))


@pytest.mark.usefixtures("shelf")
def test_what_a_stand_in_knows_costs_no_import() -> None:
    from shelf import known  # type: ignore[import-not-found]
    from shelf.book import known as also_known  # type: ignore[import-not-found]

    assert known == also_known == 1
    assert isinstance(sys.modules["shelf"], StandIn)
    assert not hasattr(sys.modules["shelf"], "__file__")


@pytest.mark.usefixtures("shelf")
def test_what_it_does_not_know_is_the_real_modules() -> None:
    from shelf import label

    assert label == "the real one"
    assert not isinstance(importlib.import_module("shelf"), StandIn)
    assert importlib.import_module("shelf.book").title == "read"


@pytest.mark.usefixtures("shelf")
def test_a_module_within_is_the_real_one_and_run_once() -> None:
    del sys.modules["shelf.book"]
    from shelf.book import times, title

    assert (title, times) == ("read", 1)
    assert sys.modules["shelf"].book is sys.modules["shelf.book"]
    assert not isinstance(sys.modules["shelf"], StandIn)


@pytest.mark.usefixtures("shelf")
def test_a_module_that_is_not_there_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("shelf.lamp")


@pytest.mark.slow
def test_a_process_starts_without_the_compiler_and_can_have_it() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", STARTED], check=True, timeout=50)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere another OpenMP comes with torch")
@pytest.mark.parametrize(("chosen", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_for_each_other_sleep_unless_told_otherwise(chosen: dict[str, str], policy: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "TRUE", **chosen}
    code = "from swarm.imports import import_lightly; import_lightly()"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert f"OMP_WAIT_POLICY = '{policy}'" in ended.stderr
