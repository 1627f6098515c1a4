"""What bad input gets: exit code 2 and one sentence that says what is wrong and where, never a traceback."""

import json
import shutil

import pytest

from tests.e2e.program import call, files_of, python, run, write_rows


def refused(*arguments) -> str:
    """The one sentence with which the program refuses, without its name."""
    return sentence_of(call(*arguments))


def sentence_of(outcome) -> str:
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err and outcome.out == ""
    (sentence,) = outcome.sentences
    assert outcome.err.splitlines()[-1] == sentence, "the sentence comes last"
    return sentence.removeprefix("distlora: ")


# ---------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method.rnak=8", "override method.rnak: unknown key, did you mean rank?"),
        ("train.lr", "override train.lr: wanted dotted.key=value, as in train.lr=1e-3"),
        ("train.lr=fast", 'override train.lr: found "fast", wanted a number'),
        (
            "train.optimizer.name=adma",
            'override train.optimizer.name: found "adma", wanted adamw, sgd, adamw8bit, paged_adamw or',
        ),
        ("method.name=lorasb", "override method.name: no method is called lorasb, did you mean lora_sb?"),
        ("data.task=gsm9k", "data.task: unknown task 'gsm9k', did you mean gsm8k?"),
        (
            "targets=[q_porj]",
            "targets: q_porj matches no linear layer of LlamaForCausalLM, did you mean q_proj?",
        ),
        ("method.rank=200", "rank 200"),
        (
            "train.global_batch_size=5",
            "train.global_batch_size=5 is not divisible by train.micro_batch_size=2",
        ),
        ("model.attention=flush", "model.attention=flush: LlamaForCausalLM has only auto"),
        ("data.max_length=4", "none of the 22 samples"),
        ("data.fields={prompt: quession}", "has no column 'quession', did you mean question?"),
        ("data.template='{questoin}'", "did you mean question?"),
        ("data.split=trian", "no file for split 'trian'"),
        ("data.eval_split=tset", "no file for split 'tset'"),
        ("train.epochs=0", "epochs and steps are both off"),
    ],
)
def test_mistake_in_the_recipe(recipe, override, expected):
    overrides = [override, "train.steps=null"] if override == "train.epochs=0" else [override]
    assert expected in refused("train", recipe, *overrides)


def test_mistakes_in_the_file_are_named_with_the_file(recipe):
    text = recipe.read_text()
    recipe.write_text(text.replace("rank:", "rnak:"))
    assert refused("train", recipe) == f"{recipe}: method.rnak: unknown key, did you mean rank?"
    recipe.write_text(text + "train: [")
    assert refused("train", recipe).startswith(f"{recipe}")
    recipe.write_text("")
    assert refused("train", recipe).startswith(f"{recipe} is no recipe")
    missing = recipe.parent / "none.yaml"
    said = f"{missing}: no such recipe; give the path of a YAML file"
    assert refused("train", missing) == f"{said}, or a name that `distlora recipes` lists"
    assert refused("train", recipe.parent).startswith(f"{recipe.parent} is a directory; give a recipe")


# ---------------------------------------------------------------------- files


def test_model_directory(recipe, model, tmp_path):
    missing = f"model.path={tmp_path}/none"
    assert refused("train", recipe, missing) == f"{missing}: there is no such directory; check the path"
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused("train", recipe, f"model.path={tmp_path}/empty")
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    assert "a weights file is broken" in refused("train", recipe, f"model.path={broken}")
    (broken / "model.safetensors").unlink()
    assert "no *.safetensors" in refused("train", recipe, f"model.path={broken}")
    shutil.copyfile(model / "model.safetensors", broken / "model.safetensors")
    (broken / "tokenizer.json").unlink()
    assert f"model.path={broken}: " in refused("train", recipe, f"model.path={broken}")
    (broken / "config.json").write_text("{")
    assert f"model.path={broken}: " in refused("train", recipe, f"model.path={broken}")


def test_data_files(recipe, tmp_path):
    folder = write_rows(tmp_path / "rows")
    there = f"data.path={folder}"
    assert f"{tmp_path}/none does not exist" in refused("train", recipe, f"data.path={tmp_path}/none")
    assert "none.jsonl does not exist" in refused("train", recipe, f"data.path={tmp_path}/none.jsonl")
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([lines[0], "{", lines[1]]))
    assert f"line 2 of {folder}/train.jsonl is not valid JSON" in refused("train", recipe, there)
    (folder / "train.jsonl").write_text(json.dumps({"question": "How many?", "anser": "3"}))
    assert "has no column 'answer', did you mean anser?" in refused("train", recipe, there)
    (folder / "train.jsonl").write_bytes(b'{"question": "\xff"}')
    assert f"{folder}/train.jsonl" in refused("train", recipe, there)
    (folder / "train.jsonl").write_text("")
    assert f"{folder}, split train has no rows" in refused("train", recipe, there)
    (folder / "train.jsonl").write_text("\n".join(lines))
    assert "has no rows" in refused("train", recipe, there, "data.split=train[:0]")
    (folder / "test.jsonl").unlink()
    assert "no file for split 'test'" in refused("train", recipe, there)
    assert "makes its own data" in refused("train", recipe, there, "data.task=arithmetic")


def test_deepspeed_config(recipe, tmp_path):
    file = tmp_path / "zero.json"
    given = ("train", recipe, f"deepspeed={file}")
    assert refused(*given).startswith(f"override deepspeed: no file {file}")
    file.write_text('{"zero_optimization": {"stage": 3,}}')
    assert refused(*given).startswith(f"{file} is not JSON: ")
    file.write_text('{"train_batch_size": 64}')
    assert refused(*given) == (
        f"recipe train.global_batch_size=4 contradicts train_batch_size=64 in {file}; "
        "set the latter to auto or make them equal"
    )
    file.write_text('{"bf16": {"enabled": true}}')
    assert refused(*given).startswith(f"recipe model.dtype=float32 contradicts bf16.enabled=true in {file}")
    file.write_text('{"scheduler": {"type": "WarmupCosineLR"}}')
    assert f'train.schedule=constant contradicts scheduler.type="WarmupCosineLR" in {file}' in refused(*given)
    file.write_text('{"zero_optimization": {"stage": 4}}')
    assert f"zero_optimization.stage in {file} is 4" in refused(*given)
    assert not (tmp_path / "run").exists()


def test_run_directory(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file is a file; name a directory" in refused(
        "train", recipe, f"output_dir={tmp_path}/file"
    )
    assert refused("train", recipe, "output_dir=/proc/none/run").startswith(
        "output_dir: /proc/none/run cannot be made"
    )


def test_other_verbs(finished, model, tmp_path):
    _, run_dir = finished
    assert refused("eval", tmp_path) == f"{tmp_path} holds no run: it has no recipe.yaml"
    out = ["--format", "peft", "--out", tmp_path / "out"]
    assert refused("export", tmp_path, *out) == f"{tmp_path} is no run directory: it has no recipe.yaml"
    assert "has no checkpoint of step 4; there are: 6, 3" in refused("export", run_dir, *out, "--step", "4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    assert "is not an empty directory" in refused("export", run_dir, *out)
    assert files_of(tmp_path) == {"out/precious": b""}


# ---------------------------------------------------------------------- the surroundings


def test_a_process_of_its_own_has_only_the_sentence_to_show(recipe, tmp_path):
    """Behind the line on where it runs; no noise of imported libraries. Here for a hub name that is out of
    reach.
    """
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    outcome = run(*python("train", recipe, "model.path=someone/some-model"), **hub)
    assert outcome.code == 2
    where, _, rest = outcome.err.partition("\n")
    assert where.startswith("1 rank on 1 host (")
    assert rest == (
        "distlora: model.path=someone/some-model: not in the Hugging Face cache, and HF_HUB_OFFLINE is set; "
        "unset it, or give a local directory\n"
    )


def test_several_ranks_without_deepspeed_or_an_address(recipe, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert "name no host" in refused("train", recipe)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr("distlora.cluster.early.LINGER", 0.1)
    assert refused("train", recipe).startswith("2 ranks need DeepSpeed")


@pytest.mark.parametrize(
    ("variable", "local"),
    [
        ("RANK", "LOCAL_RANK"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("PMI_RANK", "MPI_LOCALRANKID"),
        ("SLURM_PROCID", "SLURM_LOCALID"),
    ],
)
def test_other_ranks_than_the_first_of_a_node_say_nothing(recipe, monkeypatch, variable, local):
    """Each launcher tells a rank who it is in its own way."""
    monkeypatch.setattr("distlora.cli.ending.PATIENCE", 0)
    monkeypatch.setattr("distlora.cluster.early.LINGER", 0.1)
    size = {"RANK": "WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}.get(
        variable, variable.replace("RANK", "SIZE")
    )
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {variable: "1", local: "1", size: "2", "SLURM_STEP_ID": "0", **address}.items():
        monkeypatch.setenv(name, value)
    outcome = call("train", recipe, "train.lrr=1")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", "")
    monkeypatch.setenv(local, "0")
    assert call("train", recipe, "train.lrr=1").err.startswith("distlora (rank 1 on ")
