"""What tests are told of processes that failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torchrun import torchrun


@pytest.mark.slow
@pytest.mark.distributed
def test_an_aborted_process_is_shown_with_its_stack(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import os\nif os.environ['RANK'] == '0':\n    os.abort()\n")
    with pytest.raises(AssertionError, match="Fatal Python error: Aborted") as told:
        torchrun(script)
    assert f'File "{script}", line 3' in str(told.value)
