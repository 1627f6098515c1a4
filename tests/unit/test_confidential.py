"""What is not shown, and that everything else is."""

import json
import logging
import sys
from pathlib import Path

import pytest

import distlora
from distlora.cli import ending, prepare_launch
from distlora.cluster import environment
from distlora.cluster.logs import LOGS, RankLog
from distlora.cluster.status import STATUS, StatusFile, new_start
from distlora.errors import UserError
from distlora.exports.card import About, Form, write_card
from distlora.files.confidential import (
    hidden,
    holds_secret,
    is_secret_name,
    redacted,
    refuse_secrets,
    shown_word,
    without_secrets,
)
from distlora.models.base_names import BaseName
from distlora.recipe.load import recipe_of
from tests.e2e.program import call
from tests.e2e.program import recipe_of as content_of

SECRET = "pl4nted"
LOGIN = f"https://user:{SECRET}@host/x"

SECRET_NAMES = """
    PASS DB_PASS dbPass userpass PASSWD password PASSPHRASE COOKIE session_cookie SAS sas_token SIGNATURE
    X-Amz-Signature X-Amz-Credential X-Amz-Security-Token sig CREDENTIAL credentials AUTHORIZATION auth
    TOKEN HF_TOKEN HFTOKEN accessToken _authToken access_tokens api_key apikey APIKey x-api-key my_api_keys
    key AccountKey AWS_ACCESS_KEY_ID private_key client_secret SLURM_JWT GIT_PAT DB_PWD comet.api_key
""".split()
HARMLESS_NAMES = """
    max_new_tokens maxNewTokens pad_token pad_token_id eos_token tokens_per_second tokens tokenizer
    TOKENIZERS_PARALLELISM token_type_ids layer_token_lr_schedule HF_HUB_DISABLE_IMPLICIT_TOKEN bypass compass
    surpass OLDPWD PATH LD_LIBRARY_PATH PYTHONPATH monkey NCCL_IB_PKEY num_key_value_heads key_proj author
    forward_pass pass_rate keep_checkpoints public_key patch pattern passes design sassy known_keys
""".split()


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_name_sounds_like_a_secret(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_a_name_does_not(name):
    assert not is_secret_name(name)


# ---------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    "text",
    [
        LOGIN,
        f"https:/user:{SECRET}@host/x",  # as a path has it
        f"https://user:p@{SECRET}@host/x",
        f"https://user:pa/{SECRET}@host:80/x",
        f"https://{SECRET}@host/x",
        f"//user:{SECRET}@host",
        f"['postgres://user:{SECRET}@host/db', 'http://user:{SECRET}@host']",
        f"http://host/x?a=1&token={SECRET}",
        f"http://host/x?key={SECRET}",
        f"http://host/x?X-Amz-Signature={SECRET}&X-Amz-Credential={SECRET}",
        f"http://host/x?sv=2&sig={SECRET}",
        f"AccountName=a;AccountKey={SECRET}",
        f"hf_{SECRET}ABCDEFGH0123456789",
        f"ghp_{SECRET}ABCDEFGH0123456789",
        f"Authorization: Basic {SECRET}",
        f"{{'Authorization': 'Bearer {SECRET}'}}",
        f"curl -H 'Cookie: a={SECRET}; b={SECRET}'",
        f"deepspeed.comet.api_key={SECRET} is wrong",
        f"api_key=[{SECRET}, {SECRET}] is wrong",
        f'password="two {SECRET}"',
        f"{{'api_key': 'two {SECRET}', 'b': 1}}",
        f'{{"a": {{"wandb_api_key": "{SECRET}"}}}}',
        f"{{comet: {{enabled: true, api_key: {SECRET}}}}}",
    ],
)
def test_no_text_shows_a_secret(text):
    assert SECRET not in hidden(text) and "***" in hidden(text)
    assert hidden(hidden(text)) == hidden(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8080/models/x@main",
        "https://github.com/x/y@v1",
        "wanted dotted.key=value, as in train.lr=1e-3",
        "data.max_new_tokens=4, tokens_per_second=7",
        "hf_transformers and models/hf_llama2_7b",
        "me@host, tcp://[::1]:29500",
        "{'pad_token': '<pad>', 'num_key_value_heads': 2}",
        '{"share_att_key": true, "token": null}, use_auth=false, api_key=',
    ],
)
def test_nothing_else_is_hidden(text):
    assert hidden(text) == text


def test_pages_and_recipes_are_shown_as_they_are():
    root = Path(distlora.__file__).parents[1]
    files = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("configs/*/*")]
    assert len(files) > 30
    assert [file for file in files if hidden(file.read_text()) != file.read_text()] == []


def test_a_secret_variable_is_hidden_wherever_its_value_stands(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct horse")
    monkeypatch.setenv("SOME_KEY_PATH", "/home/me/key")
    assert hidden("it is correct horse!") == "it is ***!"
    assert hidden("/home/me/key/file") == "/home/me/key/file"
    assert holds_secret("MY_SERVICE_TOKEN", "x") and holds_secret("PROXY", LOGIN)
    assert not holds_secret("HF_HOME", "/home/me@work/hf")


def test_long_texts_take_no_time():
    for text in ("a" * 10**5, "/" * 10**5, "a." * 10**5, "://" * 10**5, "{" * 10**5, "a@" * 10**5):
        assert hidden(text) == text


# ---------------------------------------------------------------------- configs and words


def test_configs_lose_their_secrets_of_any_type_at_any_depth():
    config = {
        "comet": {"enabled": True, "api_key": [SECRET, {"x": SECRET}], "workspace": "w"},
        "wandb": {"host": LOGIN, "password": 4711, "auth": True, "token": None},
        "list": [{"secret": {"deep": SECRET}}],
        "max_new_tokens": 4,
    }
    kept = without_secrets(config)
    assert kept["comet"] == {"enabled": True, "workspace": "w"} and kept["list"] == [{}]
    assert kept["wandb"] == {"host": "https://***@host/x", "auth": True, "token": None}
    shown = redacted(config)
    assert shown["comet"]["api_key"] == shown["wandb"]["password"] == shown["list"][0]["secret"] == "***"
    assert kept["max_new_tokens"] == shown["max_new_tokens"] == 4
    assert SECRET not in json.dumps([kept, shown]) and "4711" not in json.dumps([kept, shown])


WORDS = [
    f"deepspeed.comet.api_key={SECRET}",
    f"deepspeed.comet.api_key=[{SECRET}",
    f"deepspeed.comet.api_key:{SECRET}",
    f"deepspeed={{comet: {{api_key: {SECRET}}}}}",
    f'deepspeed={{"comet":{{"api_key":["a", "{SECRET}"]}}}}',
    f"deepspeed.comet=api_key: a,{SECRET}",
    f"deepspeed=comet:\n  api_key: |\n    {SECRET}",
    f"data.path={LOGIN}",
    f"model.path=hf_{SECRET}ABCDEFGH0123456789",
]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_command_line_is_shown_without_its_secret_and_reaches_no_other_process(word):
    assert SECRET not in shown_word(word) and "***" in shown_word(word)
    with pytest.raises(UserError, match="command lines") as error:
        refuse_secrets(["train.lr=1", word])
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "word",
    ["data.max_new_tokens=4", "deepspeed={zero_optimization: {stage: 2}}", "deepspeed.comet.api_key=null"],
)
def test_other_words_are_shown_as_they_are(word):
    assert shown_word(word) == word
    refuse_secrets([word])


@pytest.mark.parametrize("word", WORDS[:4])
def test_launch_scripts_refuse_a_secret_on_their_command_line(word, tmp_path, capsys):
    words = ["--script", "x.sh", "--hostfile", "-", "--", str(tmp_path), "train", "recipe.yaml", word]
    assert prepare_launch.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "COMET_API_KEY" in said and SECRET not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "word",
    [
        f"deepspeed.comet.api_key=[{SECRET}",
        f"deepspeed.comet.api_key=*{SECRET}",
        f"deepspeed.comet={{api_key: !{SECRET} x}}",
        "deepspeed.comet.api_key=471147114711471147114711",
        f"deepspeed.comet.api_key:{SECRET}",
        f"deepspeed..api_key={SECRET}",
        f"train.steps={{api_key: {SECRET}}}",
        f"train={{password: {SECRET}}}",
        f"deepspeed.comet.enabled={{api_key: {SECRET}}}",
    ],
)
def test_a_mistake_in_an_override_does_not_repeat_its_secret(word, tmp_path):
    from distlora.recipe.deepspeed_check import checked_deepspeed

    content = content_of(Path("m"), Path("d"), tmp_path) | {"deepspeed": {"comet": {"enabled": False}}}
    with pytest.raises(UserError) as error:
        checked_deepspeed(recipe_of(content, "r.yaml", [word]), 1, 8)
    assert SECRET not in str(error.value) and "4711" not in str(error.value)


def test_a_mistake_in_a_secret_of_the_file_does_not_repeat_it(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"deepspeed:\n  comet:\n    api_key: *{SECRET}\n")
    outcome = call("train", recipe)
    assert outcome.code == 2 and "r.yaml: line 3, column 14: the value is no plain text" in outcome.err
    assert SECRET not in outcome.err
    recipe.write_text(f"deepspeed: {{comet: {{api_key: {SECRET}}}}}\n")
    outcome = call("train", recipe, "deepspeed.comet.api_key.x=1")
    assert outcome.code == 2 and "which has no keys" in outcome.err and SECRET not in outcome.err


# ---------------------------------------------------------------------- where texts leave the program


@pytest.fixture
def run_log(tmp_path, monkeypatch):
    """Of a start that says a secret, and breaks with one."""
    logger = logging.getLogger("distlora")
    monkeypatch.setattr(logger, "level", logging.INFO)
    with pytest.raises(RuntimeError), RankLog(0) as log:
        logger.info("from %s", LOGIN)
        log.open(tmp_path)
        raise RuntimeError(f"GET {LOGIN} failed")
    return (tmp_path / LOGS / "rank-0.log").read_text()


def test_logs_show_no_secret_nor_do_the_tracebacks_in_them(run_log):
    assert "from https://***@host/x" in run_log and "RuntimeError: GET https://***@host/x failed" in run_log
    assert "Traceback" in run_log and SECRET not in run_log


def test_a_status_shows_no_secret(tmp_path):
    StatusFile(tmp_path, 0, new_start()).write("failed", f"{LOGIN} is gone")
    text = (tmp_path / STATUS).read_text()
    assert "https://***@host/x is gone" in text and SECRET not in text


def test_a_card_shows_no_secret(tmp_path):
    base = BaseName(LOGIN, on_the_hub=False)
    write_card(
        tmp_path, base, About(facts={"api_key": 1, "from": LOGIN}), Form("adapter", "LlamaForCausalLM")
    )
    assert SECRET not in (tmp_path / "README.md").read_text()


def test_the_environment_of_a_run_shows_no_secret(monkeypatch):
    monkeypatch.setattr("sys.argv", ["distlora", "train", "r.yaml", "data.max_new_tokens=4", *WORDS])
    monkeypatch.setenv("HF_ENDPOINT", LOGIN)
    monkeypatch.setenv("NCCL_PASS", SECRET)
    found = environment.report({}, {"comet": {"api_key": [SECRET]}, "csv": LOGIN}, None)
    assert SECRET not in json.dumps(found) and "data.max_new_tokens=4" in found["command"]


def test_the_terminal_shows_no_secret_whatever_breaks(monkeypatch, capsys):
    outcome = call("plan", LOGIN)
    assert outcome.code == 2 and "***@host/x" in outcome.err and SECRET not in outcome.err
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr("distlora.cli.main.COMMANDS", {"status": lambda options: print(LOGIN) or {}[LOGIN]})
    with pytest.raises(KeyError) as error:
        call("status", "x")
    assert sys.excepthook is ending.show_crash
    sys.excepthook(error.type, error.value, error.tb)
    said = capsys.readouterr().err
    assert "KeyError: 'https://***@host/x'" in said and SECRET not in said
