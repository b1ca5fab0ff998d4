"""Nothing in the project knows the machine or the network it was written on."""

import re

# In pieces, so that this file does not find itself.
MACHINE_PATHS = "|".join(("/ro" + "ot/", "/ho" + "me/", "/wo" + "rk/", "/opt/" + "pypi", "/Us" + "ers/", "/mnt" + "/"))
REGISTRIES = "|".join(("python" + "hosted", "pypi" + r"\.", "artif" + "actory", "file" + ":///", r"index-url[= ]+\w"))
PATTERN = re.compile(rf"(?<![\w.~])(?:{MACHINE_PATHS})|(?:{REGISTRIES})")


def test_the_pattern_finds_what_it_should():
    for line in ("cd /wo" + "rk/main", "'/ho" + "me/ada/x'", "https://files.python" + "hosted.org/x"):
        assert PATTERN.search(line), line
    assert not PATTERN.search("frame" + "/wo" + "rk/")


def test_no_machine_path_and_no_registry(root, source_files):
    found = []
    for path in source_files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if PATTERN.search(line):
                found.append(f"{path.relative_to(root)}:{number}: {line.strip()[:100]}")
    assert found == []
