"""The recipes of ``examples/deploy``: each is what the program that reads it takes, and agrees
with the server and with the others."""

import plistlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
from processes import run_program

import mlx_lm_ext
from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.batch_server import STOP_TIMEOUT
from mlx_lm_ext.descriptors import for_connections
from mlx_lm_ext.server.http_server import CLOSE_TIMEOUT

FOLDER = Path(mlx_lm_ext.__file__).parent / "examples" / "deploy"
UNIT = FOLDER / "mlx-lm-batch-server.service"
PLIST = FOLDER / "com.github.mlx-lm-ext.batch-server.plist"
README = (FOLDER / "README.md").read_text()
SERVER = "/opt/mlx-lm-ext/bin/mlx_lm.batch_server"


def systemd_version():
    """0 if there is none."""
    try:
        shown = run_program(["systemd-analyze", "--version"], check=True)
    except OSError:
        return 0
    return int(shown.stdout.split()[1])


systemd = pytest.mark.skipif(systemd_version() < 250, reason="needs systemd 250")


def unit_settings():
    """The lines of the unit by their names, those that go on put together."""
    text = UNIT.read_text().replace("\\\n", " ")
    found = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def unit_command():
    (command,) = unit_settings()["ExecStart"]
    return shlex.split(command)


def plist():
    return plistlib.loads(PLIST.read_bytes())


def parsed(command, folder):
    """What the server makes of a command that names files where there are none here."""
    (folder / "keys").write_text("ann:secret")
    words = [folder / "keys" if w.endswith("/api-keys") else w for w in command[1:]]
    words = [str(w) for w in words if w != "$MLX_LM_ARGS"]
    return make_parser().parse_args(words)


# Both


@pytest.mark.parametrize(
    "command, seconds",
    [
        (unit_command(), int(unit_settings()["TimeoutStopSec"][0])),
        (plist()["ProgramArguments"], plist()["ExitTimeOut"]),
    ],
    ids=["systemd", "launchd"],
)
def test_server_has_keys_and_tls_and_the_time_to_end(command, seconds, tmp_path):
    assert command[0] == SERVER
    args = parsed(command, tmp_path)
    assert args.api_key_file and args.ssl_certfile and args.ssl_keyfile
    assert seconds >= args.shutdown_timeout + STOP_TIMEOUT + CLOSE_TIMEOUT


@pytest.mark.parametrize(
    "limit",
    [
        int(unit_settings()["LimitNOFILE"][0]),
        plist()["SoftResourceLimits"]["NumberOfFiles"],
    ],
    ids=["systemd", "launchd"],
)
def test_open_files_suffice_for_all_connections(limit, monkeypatch):
    monkeypatch.setattr(mlx_lm_ext.descriptors, "limit", lambda: limit)
    assert for_connections() >= make_parser().get_default("max_connections")


# systemd


def test_unit_reads_the_files_that_the_readme_makes():
    settings = unit_settings()
    copied = dict(c.split(":") for c in settings["LoadCredential"])
    used = re.findall(r"%d/(\S+)", settings["ExecStart"][0])
    assert sorted(copied) == sorted(used)
    for path in (*copied.values(), *settings["EnvironmentFile"]):
        folder, _, name = path.rpartition("/")
        assert folder in README and name in README
    (line,) = re.findall(r"^MLX_LM_ARGS=(.*)$", README, re.MULTILINE)
    assert make_parser().parse_args(line.split()).model


def test_unit_keeps_models_and_kernels_in_its_cache_directory():
    settings = unit_settings()
    kept = settings["CacheDirectory"][0].split()
    (environment,) = settings["Environment"]
    folders = re.findall(r"(?:XDG_CACHE_HOME|TMPDIR)=%C/(\S+)", environment)
    assert folders == kept
    assert settings["DynamicUser"] == ["yes"]


def test_unit_is_started_again_when_it_fails_but_for_wrong_arguments():
    settings = unit_settings()
    assert settings["Restart"] == ["on-failure"]
    with pytest.raises(SystemExit) as exit:
        make_parser().parse_args(["--no-such-argument"])
    assert settings["RestartPreventExitStatus"] == [str(exit.value.code)]
    # What the server has started, such as a compiler, may end its work.
    assert (settings["KillSignal"], settings["KillMode"]) == (["SIGTERM"], ["mixed"])


@pytest.fixture
def unit(tmp_path):
    """The unit with a program that is there."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace(SERVER, shutil.which("true")))
    return path


@systemd
def test_systemd_takes_the_unit_without_a_warning(unit):
    command = ["systemd-analyze", "verify", str(unit)]
    result = run_program(command)
    assert (result.returncode, result.stderr) == (0, "")


@systemd
def test_systemd_rates_the_security_of_the_unit_below_two(unit):
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    result = run_program(command)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", result.stdout)
    assert found, result.stderr
    assert float(found[1]) < 2


# launchd


def test_daemon_of_launchd_starts_and_ends_as_a_server_should():
    daemon = plist()
    assert daemon["Label"] == PLIST.stem
    assert daemon["RunAtLoad"] is True
    assert daemon["KeepAlive"] == {"SuccessfulExit": False}
    assert daemon["UserName"] != "root"
    assert daemon["Umask"] == 0o077
    written = daemon["EnvironmentVariables"]["XDG_CACHE_HOME"]
    assert daemon["WorkingDirectory"] == written
    assert Path(daemon["StandardErrorPath"]).parent == Path(written)
    known = {
        *("Label", "ProgramArguments", "UserName", "EnvironmentVariables", "Umask"),
        *("WorkingDirectory", "StandardErrorPath", "RunAtLoad", "KeepAlive"),
        *("ThrottleInterval", "ExitTimeOut", "SoftResourceLimits"),
        *("HardResourceLimits", "ProcessType"),
    }
    # launchd ignores a key that it does not know.
    assert set(daemon) == known


@pytest.mark.skipif(shutil.which("plutil") is None, reason="only macOS has it")
def test_macos_takes_the_plist():
    run_program(["plutil", "-lint", str(PLIST)], check=True)


# Prometheus


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no Prometheus")
def test_prometheus_takes_its_configuration():
    command = ["promtool", "check", "config", "--syntax-only"]
    command.append(str(FOLDER / "prometheus.yml"))
    result = run_program(command)
    assert result.returncode == 0, result.stderr


def test_prometheus_reads_the_files_that_the_readme_makes():
    text = (FOLDER / "prometheus.yml").read_text()
    paths = re.findall(r"_file: (\S+)", text)
    assert len(paths) == 2
    assert all(path in README for path in paths)


# The README


def test_readme_has_each_file_and_each_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)", README)
    assert all((FOLDER / link).exists() for link in links)
    named = {Path(link).name for link in links}
    assert {path.name for path in FOLDER.iterdir()} - {"README.md"} <= named


def test_alerts_ask_for_metrics_of_the_dashboard():
    dashboard = (FOLDER.parent / "grafana.json").read_text()
    asked = set(re.findall(r"mlx_lm:\w+", README))
    assert asked
    assert all(name in dashboard for name in asked)
