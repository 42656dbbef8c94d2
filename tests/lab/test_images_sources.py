"""What goes into an image, and which base it stands on: pure reading of files."""

import re
from pathlib import Path

import pytest

from taskoffer_lab.errors import LabError
from taskoffer_lab.images.base import (
    DEFAULT_MIRROR,
    DEFAULT_SECURITY,
    Mirror,
    SourceEntry,
    apt_credentials,
    host_mirror,
    read_sources,
    render_sources,
    slim_down,
)
from taskoffer_lab.images.sources import (
    OPERATOR,
    TRAINER,
    ImageSource,
    copied_paths,
    repository_root,
    snapshot,
)
from taskoffer_lab.images.store import _build_step, dial_host

REPOSITORY = Path(__file__).parents[2]
DOCKERFILES = [TRAINER, OPERATOR]

DEB822 = """\
Types: deb
# A comment between the fields, as Debian's own images have one.
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
 contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security/
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://switched.off/debian
Suites: trixie
Components: main
"""

ONE_LINE = """\
# deb http://commented.out/debian bookworm main
deb-src http://source.only/debian bookworm main
deb [arch=amd64 signed-by=/k.gpg] https://third.party/repo stable main  # not Debian
deb [ arch=amd64 ] http://lines.example/debian trixie main non-free
deb http://lines.example/debian-security trixie-security main
"""


def apt_folder(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_sources_of_both_formats_are_read_and_disabled_ones_are_not(tmp_path):
    apt = apt_folder(tmp_path, {"sources.list.d/debian.sources": DEB822, "sources.list.d/x.list": ONE_LINE})

    assert read_sources(apt) == [
        SourceEntry("http://mirror.example/debian", "bookworm", ("main", "contrib")),
        SourceEntry("http://mirror.example/debian", "bookworm-updates", ("main", "contrib")),
        SourceEntry("http://mirror.example/debian-security/", "bookworm-security", ("main",)),
        SourceEntry("https://third.party/repo", "stable", ("main",)),
        SourceEntry("http://lines.example/debian", "trixie", ("main", "non-free")),
        SourceEntry("http://lines.example/debian-security", "trixie-security", ("main",)),
    ]


MIRRORS = {
    "deb822": (
        {"sources.list.d/debian.sources": DEB822},
        Mirror("http://mirror.example/debian", "http://mirror.example/debian-security"),
    ),
    "one-line": (
        {"sources.list.d/a.list": ONE_LINE},
        Mirror("http://lines.example/debian", "http://lines.example/debian-security"),
    ),
    "no security": (
        {"sources.list": "deb http://only.one/debian bookworm main\n"},
        Mirror("http://only.one/debian", None),
    ),
    "another distribution": (
        {"sources.list": "deb http://archive.ubuntu.com/ubuntu noble main\n"},
        Mirror(DEFAULT_MIRROR, DEFAULT_SECURITY),
    ),
    "third party with Debian's suite": (
        {"sources.list": "deb https://apt.vendor.example bookworm main\n"},
        Mirror(DEFAULT_MIRROR, DEFAULT_SECURITY),
    ),
    "another scheme": (
        {"sources.list": "deb cdrom:[Debian]/debian bookworm main\n"},
        Mirror(DEFAULT_MIRROR, DEFAULT_SECURITY),
    ),
    "nothing": ({}, Mirror(DEFAULT_MIRROR, DEFAULT_SECURITY)),
}


@pytest.mark.parametrize("case", MIRRORS)
def test_the_mirror_is_the_hosts_if_that_is_a_debian_one(tmp_path, case):
    files, mirror = MIRRORS[case]

    assert host_mirror(apt_folder(tmp_path, files)) == mirror


def test_credentials_are_lent_to_builds_but_never_written_into_the_base(tmp_path):
    mirror = Mirror("http://robot:s%40cret@mirror.example:8080/debian", "http://mirror.example/debian-security")
    apt = apt_folder(tmp_path, {"auth.conf.d/own.conf": "machine other.example login a password b\n"})

    assert render_sources(mirror) == (
        "deb http://mirror.example:8080/debian bookworm main\n"
        "deb http://mirror.example:8080/debian bookworm-updates main\n"
        "deb http://mirror.example/debian-security bookworm-security main\n"
    )
    assert apt_credentials(mirror, apt) == (
        "machine other.example login a password b\n"
        "machine http://mirror.example:8080/debian login robot password s@cret\n"
    )
    assert apt_credentials(Mirror(), tmp_path / "none") == ""


def test_slimming_keeps_licences_and_drops_manuals_logs_and_package_lists(tmp_path):
    dropped = ["usr/share/doc/x/changelog.gz", "usr/share/man/man1/x.1.gz", "usr/share/locale/de/x.mo"]
    dropped += ["var/log/bootstrap.log", "var/lib/apt/lists/mirror_Packages", "var/cache/apt/archives/x.deb"]
    kept = ["usr/share/doc/x/copyright", "usr/bin/x"]
    apt_folder(tmp_path, dict.fromkeys([*dropped, *kept, "etc/dpkg/dpkg.cfg.d/old"], ""))

    slim_down(tmp_path)

    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    rules = {f"etc/dpkg/dpkg.cfg.d/{name}" for name in ("old", "docker", "docker-apt-speedup")}
    assert files == {*kept, *rules}
    assert "path-exclude /usr/share/man/*" in (tmp_path / "etc/dpkg/dpkg.cfg.d/docker").read_text()


def test_only_what_comes_from_the_context_counts_as_copied():
    dockerfile = (
        "FROM x AS stage\n# COPY comment /\nCOPY a b \\\n  dir/c /target/\n"
        "COPY --from=stage /built /\nADD --chown=1:1 d /e\nCOPY a /again\n"
    )

    assert copied_paths(dockerfile) == ["a", "b", "dir/c", "d"]


def checkout(tmp_path: Path, **changes: str) -> Path:
    files = {
        "Dockerfile.x": "FROM scratch\nCOPY lock /\nCOPY code /code\n",
        "lock": "1",
        "code/main.py": "print()",
        "other.txt": "unrelated",
    }
    return apt_folder(tmp_path / "checkout", files | {key.replace("__", "/"): text for key, text in changes.items()})


SOURCE = ImageSource("x", "Dockerfile.x")


def test_the_context_holds_the_copied_files_only_and_everyone_may_read_them(tmp_path):
    root = checkout(tmp_path)
    (root / "code/main.py").chmod(0o600)
    (root / "code").chmod(0o700)
    apt_folder(root, {"code/__pycache__/main.cpython-311.pyc": "x"})

    context = snapshot(SOURCE, tmp_path / "context", root)

    names = {str(path.relative_to(context.folder)) for path in context.folder.rglob("*")}
    assert names == {"Dockerfile.x", "lock", "code", "code/main.py"}
    assert (context.folder / "code/main.py").stat().st_mode & 0o777 == 0o644
    assert (context.folder / "code").stat().st_mode & 0o777 == 0o755
    assert re.fullmatch("[0-9a-f]{12}", context.key)


CHANGES = {
    "a code file": ({"code__main.py": "print(1)"}, False),
    "a new code file": ({"code__new.py": ""}, False),
    "the lock file": ({"lock": "2"}, False),
    "the Dockerfile": ({"Dockerfile.x": "FROM scratch\nCOPY lock /\nCOPY code /elsewhere\n"}, False),
    "a file outside": ({"other.txt": "changed"}, True),
    "bytecode": ({"code____pycache__.pyc": "x"}, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_follows_the_content_and_nothing_else(tmp_path, change):
    changed, same = CHANGES[change]
    before = snapshot(SOURCE, tmp_path / "before", checkout(tmp_path)).key

    assert (snapshot(SOURCE, tmp_path / "after", checkout(tmp_path, **changed)).key == before) is same


def test_a_file_that_moves_between_names_changes_the_key(tmp_path):
    before = snapshot(SOURCE, tmp_path / "before", checkout(tmp_path))
    root = checkout(tmp_path)
    (root / "code/main.py").rename(root / "code/moved.py")

    assert snapshot(SOURCE, tmp_path / "after", root).key != before.key


def test_a_missing_file_is_named(tmp_path):
    root = checkout(tmp_path)
    (root / "lock").unlink()

    with pytest.raises(LabError, match=r"Dockerfile\.x copies lock, which is not in"):
        snapshot(SOURCE, tmp_path / "context", root)


def instructions(source: ImageSource) -> list[str]:
    text = (REPOSITORY / source.dockerfile).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("source", DOCKERFILES, ids=lambda source: source.name)
def test_code_is_copied_after_the_last_run_so_that_its_change_rebuilds_nothing_else(source):
    lines = instructions(source)
    last_run = max(index for index, line in enumerate(lines) if line.startswith("RUN"))
    code = [line for line in lines if line.startswith("COPY") and ("operator/" in line or "trainer_image/" in line)]

    assert code
    assert all(lines.index(line) > last_run for line in code)
    assert all(line.startswith("COPY") for line in lines[lines.index(code[0]) :])


@pytest.mark.parametrize("source", DOCKERFILES, ids=lambda source: source.name)
def test_the_package_layers_see_nothing_of_the_context_but_their_part_of_the_lock_file(source):
    lines = instructions(source)
    final = lines[max(index for index, line in enumerate(lines) if line.startswith("FROM")) :]
    last_run = max(index for index, line in enumerate(final) if line.startswith("RUN"))

    copies = [line for line in final[:last_run] if line.startswith(("COPY", "ADD"))]
    assert copies
    assert all(line.startswith("COPY --from=lock /requirements/") for line in copies)


@pytest.mark.parametrize("source", DOCKERFILES, ids=lambda source: source.name)
def test_an_image_runs_as_nobody_special_and_needs_no_network_to_be_parsed(source):
    lines = instructions(source)

    assert [line for line in lines if line.startswith("USER")] == ["USER 65532:65532"]
    assert sum(line.startswith("ENTRYPOINT") for line in lines) == 1
    assert "ARG BASE=docker.io/library/debian:bookworm-slim" in lines
    assert "# syntax" not in (REPOSITORY / source.dockerfile).read_text()


@pytest.mark.parametrize("source", DOCKERFILES, ids=lambda source: source.name)
def test_the_ignore_file_lets_through_exactly_what_is_copied(source):
    rules = (REPOSITORY / ".dockerignore").read_text().splitlines()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]

    assert "*" in rules
    for name in copied_paths((REPOSITORY / source.dockerfile).read_text()):
        assert any(name == rule or name.startswith(f"{rule}/") for rule in allowed), name


def test_the_trainer_gets_nothing_of_the_operator_but_its_words():
    copied = copied_paths((REPOSITORY / TRAINER.dockerfile).read_text())

    assert [name for name in copied if name.startswith("operator")] == [
        "operator/taskoffer/__init__.py",
        "operator/taskoffer/py.typed",
        "operator/taskoffer/api",
    ]


def test_the_repository_is_found_from_the_package():
    assert repository_root() == REPOSITORY


@pytest.mark.parametrize(
    ("endpoint", "host"),
    [("http://10.210.0.1:21000", "10.210.0.1"), ("http://0.0.0.0:21000", "127.0.0.1")],
)
def test_an_endpoint_is_dialled_where_this_machine_reaches_it(endpoint, host):
    assert dial_host(endpoint) == host


@pytest.mark.parametrize("endpoint", ["10.0.0.1:5000", "https://h:1", "http://h", ""])
def test_an_endpoint_of_another_form_is_refused(endpoint):
    with pytest.raises(LabError, match="is not http://HOST:PORT"):
        dial_host(endpoint)


def test_progress_names_the_step_without_its_boilerplate():
    line = (
        "[2/2] STEP 6/19: RUN --mount=type=bind,from=lock,source=/opt/uv,target=/opt/uv "
        "--mount=type=secret,id=ca,target=/run/secrets/ca.crt     if [ -f /run/secrets/ca.crt ]; then "
        "export SSL_CERT_FILE=/run/secrets/ca.crt; fi  && /opt/uv/bin/uv pip install -r x.txt"
    )

    assert _build_step(line) == "[2/2] STEP 6/19 RUN uv pip install -r x.txt"
    assert _build_step("Installed 18 packages in 15.31s") is None
