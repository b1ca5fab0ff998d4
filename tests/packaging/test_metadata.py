"""The metadata that an index shows: absolute links, addresses made from one, the Pythons that wheels are built for."""

from __future__ import annotations

import email
import email.message
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = "from setuptools import build_meta; import sys; build_meta.prepare_metadata_for_build_wheel(sys.argv.pop())"
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(?:\]\(|^\[[^\]\n]+\]: *|(?:href|src|srcset)=")([^\s)"]+)', re.MULTILINE)

TRICKY = """# Title

[page](docs/gpu.md), [`code`](docs/a.md#part), [here](#title), ![plot](a/b.svg), [![badge](c.png)](LICENSE) and
[there](https://example.com/x) and [mail](mailto:a@example.com), `x[0](y)`. <img src="d.jpg"> <a href="CHANGELOG.md">

```python
found = table[0](key)
```

[ref]: docs/b.md
"""


def build(tree: Path, out: Path) -> email.message.Message:
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=tree, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.dist-info/METADATA")
    return email.message_from_bytes(path.read_bytes())


def body(metadata: email.message.Message) -> str:
    return bytes(metadata.get_payload(decode=True)).decode()


@pytest.fixture(scope="module")
def metadata(root, tmp_path_factory) -> email.message.Message:
    return build(root, tmp_path_factory.mktemp("metadata"))


@pytest.fixture(scope="module")
def repository(root) -> str:
    (address,) = re.findall(r'^REPOSITORY = "(https://\S+)"$', (root / "setup.py").read_text(), re.MULTILINE)
    return address


def test_every_link_of_the_description_is_absolute_and_leads_to_a_file(metadata, repository, root):
    description = body(metadata)
    links = LINK.findall(CODE.sub("", description))
    relative = LINK.findall(CODE.sub("", (root / "README.md").read_text(encoding="utf-8")))
    assert len(links) == len(relative) > 5
    assert [link for link in links if not re.match(r"https?://|mailto:", link)] == []
    ours = [link.removeprefix(repository) for link in links if link.startswith(repository)]
    paths = [re.fullmatch(r"/(?:raw|blob)/HEAD/([^#]+)(?:#.*)?", link) for link in ours if link[0] != "#"]
    assert ours and all(path and (root / path[1]).exists() for path in paths), ours


def test_the_description_has_the_code_of_the_readme(metadata, root):
    assert CODE.findall(body(metadata)) == CODE.findall((root / "README.md").read_text(encoding="utf-8"))


def test_links_of_every_form_become_absolute_and_nothing_else_changes(root, repository, tmp_path):
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    for name in ("csrc", "sphere_kernels", "python", "tools"):
        shutil.copytree(
            root / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        )
    (tmp_path / "README.md").write_text(TRICKY)
    (tmp_path / "out").mkdir()
    made = body(build(tmp_path, tmp_path / "out"))
    blob, raw = f"{repository}/blob/HEAD/", f"{repository}/raw/HEAD/"
    want = TRICKY
    for before, after in (
        ("(docs/", f"({blob}docs/"),
        ("(#title)", f"({repository}#title)"),
        ("(a/b.svg)", f"({raw}a/b.svg)"),
        ("(c.png)", f"({raw}c.png)"),
        ("(LICENSE)", f"({blob}LICENSE)"),
        ('"d.jpg"', f'"{raw}d.jpg"'),
        ('"CHANGELOG.md"', f'"{blob}CHANGELOG.md"'),
        (": docs/b.md", f": {blob}docs/b.md"),
    ):
        assert before in want
        want = want.replace(before, after)
    assert made.strip() == want.strip()


def test_the_address_of_the_repository_is_stated_once(metadata, repository, root, source_files):
    urls = dict(url.split(", ", 1) for url in metadata.get_all("Project-URL"))
    assert set(urls) == {"Repository", "Documentation", "Changelog", "Issues"}
    assert urls["Repository"] == repository and all(url.startswith(repository) for url in urls.values())
    found = [path for path in source_files if path.suffix != ".svg" and repository.encode() in path.read_bytes()]
    assert found == [root / "setup.py"]


def test_wheels_are_built_for_the_versions_of_python_that_are_promised(metadata, root):
    promised = re.findall(r"Python :: (3\.\d+)$", "\n".join(metadata.get_all("Classifier")), re.MULTILINE)
    assert metadata["Requires-Python"] == f">={promised[0]}"
    (built,) = re.findall(
        r'^\[tool\.cibuildwheel\]\nbuild = "(.+)"$', (root / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert built.split() == [f"cp{version.replace('.', '')}-*" for version in promised]


def test_the_extra_triton_takes_whatever_version_the_installed_torch_requires(metadata):
    """A torch for GPUs requires one triton exactly; with a bound, pip replaces torch to satisfy both."""
    needs = [need for need in metadata.get_all("Requires-Dist") if re.search(r"extra == .triton.", need)]
    assert [re.split(r"\s*;", need)[0] for need in needs] == ["triton"]
