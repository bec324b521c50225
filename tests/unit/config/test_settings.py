"""Settings: one precedence, errors that name setting and source, a reference that is current."""

from pathlib import Path

import pytest

from isthmus.app import engine_settings, store_settings
from isthmus.cli.configure import reference
from isthmus.config import MIB, load, specs
from isthmus.contracts.errors import ConfigInvalid

HOME = {"HOME": "/home/nobody"}


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_each_source_wins_over_the_next(tmp_path: Path) -> None:
    Path("isthmus.toml").write_text("port = 1001\nmax_running = 11\nthreads = 1\nexact = true\n")
    environment = {**HOME, "ISTHMUS_PORT": "1002", "ISTHMUS_THREADS": "2"}
    loaded = load({"port": "1003"}, environment)
    settings = loaded.settings
    assert (settings.port, settings.threads, settings.max_running, settings.max_waiting) == (1003, 2, 11, 512)
    assert settings.exact
    names = ("port", "threads", "max_running", "max_waiting")
    assert [loaded.sources[name] for name in names] == ["--port", "ISTHMUS_THREADS", "isthmus.toml", "default"]


def test_which_file_is_read(tmp_path: Path) -> None:
    for name, port in (("isthmus.toml", 1), ("env.toml", 2), ("flag.toml", 3)):
        Path(name).write_text(f"port = {port}")
    assert load({}, HOME).settings.port == 1
    assert load({}, {**HOME, "ISTHMUS_CONFIG": "env.toml"}).settings.port == 2
    assert load({}, {**HOME, "ISTHMUS_CONFIG": "env.toml"}, "flag.toml").settings.port == 3
    with pytest.raises(ConfigInvalid, match=r"none\.toml does not exist"):
        load({}, HOME, "none.toml")


def test_forms_of_values() -> None:
    flags = {"kv_memory": "512MiB", "exact": True, "allowed_hosts": "a, b", "drain_s": "1.5", "journal": "off"}
    settings = load(flags, HOME).settings
    assert settings.kv_memory == 512 * MIB
    assert settings.allowed_hosts == ("a", "b")
    assert (settings.exact, settings.drain_s, settings.journal) == (True, 1.5, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "70000"),
        ("port", "80x"),
        ("port", "-1"),
        ("port", ""),
        ("kv_memory", "1"),
        ("kv_memory", "12 parsecs"),
        ("exact", "maybe"),
        ("dtype", "int8"),
        ("device", "tpu"),
        ("drain_s", "nan"),
        ("drain_s", "1e400"),
        ("speculate", "17"),
        ("model", "a\0b"),
        ("host", "0.0.0.0"),
        ("host", "192.168.1.1"),
        ("host", "example.org"),
        ("max_batch_tokens", "32"),
        ("default_deadline_s", "7200"),
        ("model_name", "x" * 257),
    ],
)
def test_a_value_that_is_not_accepted_names_setting_and_source(name: str, value: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"(?s){name}.*ISTHMUS_{name.upper()}"):
        load({}, {**HOME, f"ISTHMUS_{name.upper()}": value})
    with pytest.raises(ConfigInvalid, match=f"--{name.replace('_', '-')}"):
        load({name: value}, HOME)


@pytest.mark.parametrize("line", ["port = true", "port = 8000.5", "port = [1]", "exact = 1", "drain_s = nan", "[port]"])
def test_wrong_types_in_a_file_name_the_file(line: str) -> None:
    Path("isthmus.toml").write_text(line)
    with pytest.raises(ConfigInvalid, match=r"isthmus\.toml"):
        load({}, HOME)


def test_unknown_names_are_refused_with_a_hint() -> None:
    with pytest.raises(ConfigInvalid, match=r"ISTHMUS_MAX_RUNING.*did you mean max_running"):
        load({}, {**HOME, "ISTHMUS_MAX_RUNING": "1"})
    Path("isthmus.toml").write_text("prot = 1")
    with pytest.raises(ConfigInvalid, match=r"isthmus\.toml.*did you mean port"):
        load({}, HOME)


@pytest.mark.parametrize("content", [b"port = ", b"\xff", b"x" * (MIB + 1)])
def test_a_file_that_is_not_toml_is_refused(content: bytes) -> None:
    Path("isthmus.toml").write_bytes(content)
    with pytest.raises(ConfigInvalid, match=r"isthmus\.toml"):
        load({}, HOME)


def test_exact_mode_needs_full_precision() -> None:
    with pytest.raises(ConfigInvalid, match="dtype"):
        load({"exact": True, "dtype": "bf16"}, HOME)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_may_be_bound(host: str) -> None:
    assert load({"host": host}, HOME).settings.host == host


def test_the_state_directory_follows_xdg() -> None:
    assert load({}, HOME).settings.state_dir == "/home/nobody/.local/state/isthmus"
    assert load({}, {**HOME, "XDG_STATE_HOME": "/s"}).settings.state_dir == "/s/isthmus"
    assert load({}, {**HOME, "XDG_STATE_HOME": "relative"}).settings.state_dir == "/home/nobody/.local/state/isthmus"
    assert load({"state_dir": "/x"}, HOME).settings.journal_path == Path("/x/journal.db")


def test_names_of_models() -> None:
    assert load({}, HOME).settings.served_name == "isthmus"
    assert (load({}, HOME).settings.model_folder / "tokenizer.json").exists()
    assert load({"model": "a/Qwen3"}, HOME).settings.served_name == "Qwen3"
    assert load({"model": "a/Qwen3", "model_name": "q"}, HOME).settings.served_name == "q"


def test_every_default_is_accepted_as_it_is_shown() -> None:
    from isthmus.cli.flags import show_setting

    shown = {name: show_setting(name, default) for name, (_, default) in specs().items()}
    assert load(shown, HOME).settings == load({}, HOME).settings


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "configuration.md"
    assert page.read_text() == reference(), "run: isthmus config --markdown > docs/configuration.md"


def test_pieces_are_compiled_under_the_state_directory_unless_told_not_to() -> None:
    settings = load({"state_dir": "/s"}, {}).settings
    told = engine_settings(settings)
    assert (told.compiled, told.compiled_dir) == ("auto", "/s/compiled")
    assert engine_settings(load({"compile": False, "state_dir": "/s"}, {}).settings).compiled == "off"
    assert engine_settings(load({}, {"ISTHMUS_COMPILE": "off"}).settings).compiled == "off"


@pytest.mark.parametrize("disk", ["160MiB", "1GiB", "8GiB", "9GiB", "1TiB"])
def test_a_store_of_any_size_can_be_made(disk: str) -> None:
    made = store_settings(load({"store_disk": disk, "state_dir": "/s"}, {}).settings)
    assert made.log is not None
    assert made.log.geometry().segments >= 8
    assert made.path == "/s/store/log"


def test_a_store_without_a_disk_has_no_path() -> None:
    made = store_settings(load({"store_disk": "0", "state_dir": "/s"}, {}).settings)
    assert (made.log, made.path) == (None, "")


@pytest.mark.parametrize(
    ("name", "value"), [("store_disk", "10MiB"), ("store_disk", "1048576TiB"), ("store_memory", "1048577")]
)
def test_sizes_of_a_store_that_cannot_work_are_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigInvalid, match=name):
        store_settings(load({name: value, "state_dir": "/s"}, {}).settings)
