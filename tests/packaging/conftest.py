import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = {".git", ".cache", "build", "dist", "__pycache__"}


def listed_by_git() -> list[Path] | None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in answer.stdout.decode().split("\0") if name]


def walked() -> list[Path]:
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in NOT_OURS
            and not name.startswith(".venv")
            and "egg-info" not in name
            and not name.endswith("_cache")
            and Path(folder, name) != ROOT / "runs"
        ]
        found += [Path(folder, name) for name in names if not name.endswith((".so", ".pyc"))]
    return found


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def source_files() -> list[Path]:
    """The files that belong to the project, whether or not they are committed yet."""
    listed = listed_by_git()
    return sorted(path for path in (walked() if listed is None else listed) if path.is_file())
