"""Settings: file, environment and command line, and what is wrong with them at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")

from service import planner
from service.app import with_token
from service.command import main
from service.settings import Settings, read_settings


def test_what_is_given_comes_before_the_environment_and_that_before_the_file(tmp_path):
    file = tmp_path / "service.toml"
    file.write_text('port = 1\nworkers = 2\nqueue = 3\nhosts = ["a.lan"]\n')
    environment = {"LLAMA_MERGE_PORT": "4", "LLAMA_MERGE_WORKERS": "5"}
    found = read_settings(file, {"port": 6, "host": None}, environment)
    assert (found.port, found.workers, found.queue, found.hosts) == (6, 5, 3, ("a.lan",))
    assert found.host == "127.0.0.1"


def test_the_environment_names_the_file_and_lists(tmp_path):
    file = tmp_path / "service.toml"
    file.write_text('disk_reserve = "2GB"\n')
    for name in "ab":
        (tmp_path / name).mkdir()
    environment = {
        "LLAMA_MERGE_CONFIG": str(file),
        "LLAMA_MERGE_MODELS": f"{tmp_path}/a:{tmp_path}/b",
        "LLAMA_MERGE_HOSTS": "merge.lan,merge",
        "LLAMA_MERGE_HUB_DOWNLOADS": "true",
    }
    found = read_settings(environment=environment)
    assert found.disk_reserve == 2 * 10**9
    assert found.models == (tmp_path / "a", tmp_path / "b")
    assert found.hosts == ("merge.lan", "merge")
    assert found.hub_downloads


def test_all_that_is_wrong_is_said_at_once_and_where(tmp_path):
    file = tmp_path / "service.toml"
    file.write_text("port = 70000\nprot = 1\n")
    environment = {"LLAMA_MERGE_WORKERS": "none", "LLAMA_MERGE_TOKEN": "short"}
    said = r"unknown setting 'prot'.*Did you mean 'port'\?"
    with pytest.raises(ValueError, match=said) as caught:
        read_settings(file, {"max_memory": "much"}, environment)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        str(file),
        "LLAMA_MERGE_TOKEN",
        "LLAMA_MERGE_WORKERS",
        "--max-memory",
        str(file),
    ]
    assert "short" not in str(caught.value)  # a token is told to nobody


def test_a_file_that_is_not_toml_is_named(tmp_path):
    file = tmp_path / "service.toml"
    file.write_text("port: 1")
    with pytest.raises(ValueError, match=r"service\.toml: is not TOML"):
        read_settings(file, {}, {})


def test_a_token_is_made_where_others_can_reach_it():
    assert with_token(Settings()).token is None
    assert len(with_token(Settings(host="0.0.0.0")).token) >= 32
    given = Settings(host="0.0.0.0", token="0123456789abcdef")
    assert with_token(given).token == "0123456789abcdef"


def test_memory_of_jobs_is_shared_by_those_that_run_at_once():
    assert Settings(max_memory="2GB").memory_bytes == 2 * 10**9
    one, four = Settings().memory_bytes, Settings(workers=4).memory_bytes
    assert one is None or four < one / 3


def test_one_folder_needs_no_list_and_must_be_there(tmp_path):
    file = tmp_path / "service.toml"
    file.write_text(f'models = "{tmp_path}"\ndisk_reserve = 0\n')
    found = read_settings(file, {}, {})
    assert (found.models, found.disk_reserve) == ((tmp_path,), 0)
    gone = [tmp_path / "gone"]
    with pytest.raises(ValueError, match=f"^--models: there is no folder {tmp_path}/gone. Make it"):
        read_settings(None, {"models": gone}, {})


def test_a_misspelt_variable_is_not_passed_over():
    with pytest.raises(ValueError, match=r"unknown .* 'LLAMA_MERGE_PROT'.*mean 'LLAMA_MERGE_PORT'"):
        read_settings(environment={"LLAMA_MERGE_PROT": "1"})


def test_a_size_that_is_none_is_said_once():
    said = r"^--max-memory: max_memory must be a size such as 5GB or 500MB, got 'lots'$"
    with pytest.raises(ValueError, match=said):
        read_settings(None, {"max_memory": "lots"}, {})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"keep_days": "inf"}, "--keep-days: keep_days: input should be a finite number"),
        ({"keep_days": 1e6}, "--keep-days: keep_days: input should be less than or equal to 36500"),
        ({"hub_models": ("org/name@main",)}, "--hub-models: hub_models must be ids such as org/n"),
        ({"hub_models": ("/etc",)}, "--hub-models: hub_models must be ids such as org/name"),
        ({"hosts": ("http://merge.lan",)}, "--hosts: hosts must be names such as merge.lan"),
        ({"hosts": ("merge.lan:80",)}, "--hosts: hosts must be names such as merge.lan"),
        ({"models": ("",)}, "--models: models has an entry that is empty"),
        ({"max_memory": "10MB"}, "--max-memory: max_memory must be at least 100MB, got 10MB"),
        ({"host": ""}, "--host: host: string should have at least 1 character"),
    ],
)
def test_what_would_go_wrong_later_is_refused_at_the_start(given, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        read_settings(None, given, {})


def test_spaces_and_commas_around_names_are_nothing():
    found = read_settings(environment={"LLAMA_MERGE_HOSTS": "merge.lan, merge,"})
    assert found.hosts == ("merge.lan", "merge")


def test_a_token_is_made_where_a_proxy_lets_others_in():
    assert with_token(Settings(hosts=("localhost",))).token is None
    for settings in (Settings(hosts=("merge.lan",)), Settings(trusted_proxies=("127.0.0.1",))):
        assert len(with_token(settings).token) >= 32


def test_a_device_that_is_not_there_is_said_at_the_start(capsys, monkeypatch):
    monkeypatch.setattr(planner, "ProcessPoolExecutor", InThisProcess)
    assert main(["--device", "cuda:77", "--port", "0"]) == 2
    assert "device 'cuda:77' cannot be used here" in capsys.readouterr().err


class InThisProcess(ThreadPoolExecutor):
    """Instead of a process, which would load PyTorch anew."""

    def __init__(self, count, mp_context):
        super().__init__(count)
