"""The public calls: what `import distlora` costs, plain PyTorch, and the errors of a user."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import distlora
from distlora import UserError
from distlora.engine.optimizers import OptimizerSpec, spec_of
from tests.distributed.users_engine import BATCH, RATE, Case, adapted_network, batches, loss_of, plain, told

FP32 = torch.float32
SRLORA = {"rank": 4, "target_rank": 12, "gamma": 0.5, "interval": 2}
STEPS = 6


def started(method="lora", steps=STEPS, dtype=FP32, **settings):
    """An adapted network with its optimizer, initialised."""
    case = Case(method, settings or {"rank": 4}, steps=steps)
    adapted = adapted_network(case)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE, weight_decay=0.0)
    distlora.initialise(adapted, optimizer=optimizer, **told(case, dtype, 0, 1, 2))
    return adapted, optimizer


def step(adapted, optimizer) -> float:
    optimizer.zero_grad()
    (batch,) = batches(adapted.steps, BATCH, FP32, 0, 1, 1)
    loss = loss_of(adapted.model, batch)
    loss.backward()
    adapted.before_step()
    optimizer.step()
    adapted.after_step(loss)
    return loss.item()


def refused(*words):
    anything = r"[^\n]*"
    return pytest.raises(UserError, match=f"^{anything}{anything.join(words)}{anything}$")


# ---------------------------------------------------------------------- the door


def test_the_import_is_cheap_and_brings_no_torch():
    check = "import sys, distlora; assert not {'torch', 'pydantic'} & set(sys.modules); print('fine')"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
    import_alone = "import time; t = time.perf_counter(); import distlora; print(time.perf_counter() - t)"
    seconds = min(
        float(subprocess.run([sys.executable, "-c", import_alone], capture_output=True, text=True).stdout)
        for _ in range(3)
    )
    assert seconds < 0.2


def test_every_public_name_is_there_documented_and_nothing_else_pretends_to_be():
    for name in distlora.__all__:
        assert getattr(distlora, name).__doc__, name
    assert set(distlora.__all__) <= set(dir(distlora))
    with pytest.raises(AttributeError, match="atach"):
        distlora.atach  # noqa: B018


def test_the_public_calls_stay_calls_whatever_has_been_imported():
    """A folder of the same name would take the function's place once it is imported."""
    check = (
        "import importlib, pkgutil, distlora\n"
        "for module in pkgutil.iter_modules(distlora.__path__):\n"
        "    importlib.import_module(f'distlora.{module.name}')\n"
        "assert all(callable(getattr(distlora, name)) for name in distlora.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- plain PyTorch


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora_sb", {"rank": 4, "init": {"eta": 1e-2}}),
        ("lora_ga", {"rank": 2}),
        ("srlora", SRLORA),
        ("srlora", SRLORA | {"refill": "gradient"}),
        ("lora_pro", {"rank": 4}),
        ("dora", {"rank": 4}),
        ("full", {}),
    ],
)
def test_any_method_trains_any_network(method, settings):
    losses = plain(Case(method, settings, steps=12))
    assert losses[-1] < losses[0] - 0.02


def test_what_a_recomposition_decided_is_told():
    adapted, optimizer = started("srlora", **SRLORA)
    reports = []
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(adapted.model, batches(number, BATCH, FP32, 0, 1, 1)[0])
        loss.backward()
        adapted.before_step()
        optimizer.step()
        reports.append(adapted.after_step(loss))
    assert [report.step for report in reports if report] == [2, 4]


def test_training_mode_is_left_as_it_was():
    for mode in (True, False):
        adapted = adapted_network(Case("lora_sb", {"rank": 4}))
        adapted.model.train(mode)
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE)
        case = Case("lora_sb", steps=STEPS)
        distlora.initialise(adapted, optimizer=optimizer, **told(case, FP32, 0, 1, 2))
        assert all(module.training == mode for module in adapted.model.modules())


def test_a_global_generator_is_never_touched():
    case = Case("lora_sb", {"rank": 4}, steps=STEPS)
    adapted = adapted_network(case)  # torch itself draws while the network's own layers are made
    before = torch.get_rng_state()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE)
    distlora.initialise(adapted, optimizer=optimizer, **told(case, FP32, 0, 1, 2))
    step(adapted, optimizer)
    assert torch.equal(torch.get_rng_state(), before)


def test_accumulated_micro_batches_are_one_step_for_an_adaptive_schedule():
    adaptive = {"window": 1, "improvement": 0.9, "share": 1.0, "freeze_fraction": 0.0}
    settings = {"rank": 4, "target_rank": 12, "schedule": "adaptive", "adaptive": adaptive}
    adapted, optimizer = started("srlora", **settings)
    (batch,) = batches(0, BATCH, FP32, 0, 1, 1)
    loss_of(adapted.model, batch).backward()
    adapted.before_step()
    with refused("loss", "after_step"):
        adapted.after_step()


# ---------------------------------------------------------------------- keeping


def test_a_run_goes_on_from_its_checkpoint_to_the_last_bit(tmp_path):
    adapted, optimizer = started("srlora", **SRLORA)
    losses = [step(adapted, optimizer) for _ in range(3)]
    distlora.save(adapted, tmp_path)
    losses += [step(adapted, optimizer) for _ in range(3)]
    case = Case("srlora", SRLORA, steps=STEPS)
    again = adapted_network(case)
    optimizer = torch.optim.AdamW(again.parameters(), lr=RATE, weight_decay=0.0)
    state = distlora.load(again, None, tmp_path, optimizer=optimizer, **told(case, FP32, 0, 1, 2))
    assert state["step"] == again.steps == 3
    assert [step(again, optimizer) for _ in range(3)] == losses[3:]


def test_weights_that_hold_the_updates_already_get_them_only_once(tmp_path):
    """The network's own state dict was loaded besides, as with an engine's own checkpoint."""
    adapted, optimizer = started("srlora", **SRLORA)
    for _ in range(3):
        step(adapted, optimizer)
    distlora.save(adapted, tmp_path)
    weights = {name: value.clone() for name, value in adapted.model.state_dict().items()}
    losses = [step(adapted, optimizer) for _ in range(3)]
    case = Case("srlora", SRLORA, steps=STEPS)
    again = adapted_network(case)
    again.model.load_state_dict(weights)
    optimizer = torch.optim.AdamW(again.parameters(), lr=RATE, weight_decay=0.0)
    distlora.load(again, None, tmp_path, optimizer=optimizer, **told(case, FP32, 0, 1, 2))
    assert [step(again, optimizer) for _ in range(3)] == losses


def test_other_weights_are_refused(tmp_path):
    adapted, optimizer = started("srlora", **SRLORA)
    step(adapted, optimizer)
    distlora.save(adapted, tmp_path)
    case = Case("srlora", SRLORA, steps=STEPS)
    again = adapted_network(case)
    with torch.no_grad():
        again.layers["second"].weight += 0.5
    optimizer = torch.optim.AdamW(again.parameters(), lr=RATE, weight_decay=0.0)
    with refused("weight of second", "neither the pretrained"):
        distlora.load(again, None, tmp_path, optimizer=optimizer, **told(case, FP32, 0, 1, 2))


def test_what_is_loaded_for_evaluation_cannot_be_trained(tmp_path):
    adapted, optimizer = started("srlora", **SRLORA)
    step(adapted, optimizer)
    distlora.save(adapted, tmp_path)
    again = adapted_network(Case("srlora", SRLORA))
    optimizer = torch.optim.AdamW(again.parameters(), lr=RATE, weight_decay=0.0)
    distlora.load(again, None, tmp_path, optimizer=optimizer, training=False)
    x = batches(9, BATCH, FP32, 0, 1, 1)[0]["x"]
    assert torch.equal(again.model(x), adapted.model(x))
    with refused("loaded for evaluation"):
        again.before_step()


def test_a_merged_export_is_what_the_live_network_computes(tmp_path):
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import tiny_model_dir

    directory = tiny_model_dir("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=FP32)
    adapted = distlora.attach(model, "srlora", rank=4, interval=1, target_rank=8)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE, weight_decay=0.0)
    distlora.initialise(adapted, optimizer=optimizer, steps=4)
    ids = torch.arange(5, 45)[None]
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        adapted.before_step()
        optimizer.step()
        adapted.after_step(loss)
    distlora.export(adapted, tmp_path / "merged", format="merged", base_model=directory)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=FP32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    distlora.export(adapted, tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    with refused("base_model"):
        distlora.export(adapted, tmp_path / "again", format="merged")


def test_what_others_left_in_the_directory_is_left_alone(tmp_path):
    adapted, optimizer = started("srlora", **SRLORA)
    for name in ("checkpoint-1", "checkpoint-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("theirs")
    for _ in range(2):
        step(adapted, optimizer)
    distlora.save(adapted, tmp_path)
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    step(adapted, optimizer)
    with refused("checkpoint-3 is no checkpoint of distlora"):
        distlora.save(adapted, tmp_path)
    assert (tmp_path / "checkpoint-3" / "model.safetensors").read_text() == "theirs"
    other, optimizer = started("srlora", **SRLORA)
    with refused("later step 2, of another run"):
        distlora.save(other, tmp_path, step=0)


def test_the_number_of_a_checkpoint_is_not_the_count_of_steps(tmp_path):
    adapted, optimizer = started("srlora", **SRLORA)
    losses = [step(adapted, optimizer) for _ in range(3)]
    distlora.save(adapted, tmp_path, step=1)  # an epoch, say
    losses += [step(adapted, optimizer) for _ in range(3)]
    case = Case("srlora", SRLORA, steps=STEPS)
    again = adapted_network(case)
    optimizer = torch.optim.AdamW(again.parameters(), lr=RATE, weight_decay=0.0)
    distlora.load(again, None, tmp_path, step=1, optimizer=optimizer, **told(case, FP32, 0, 1, 2))
    assert again.steps == 3 and [step(again, optimizer) for _ in range(3)] == losses[3:]


def test_a_method_with_other_settings_is_refused(tmp_path):
    adapted, optimizer = started("lora", rank=4, alpha=32)
    step(adapted, optimizer)
    distlora.save(adapted, tmp_path)
    again = adapted_network(Case("lora", {"rank": 4}))
    optimizer = torch.optim.AdamW(again.parameters(), lr=RATE, weight_decay=0.0)
    with refused("alpha=32.0 of the method, and this one has null"):
        distlora.load(again, None, tmp_path, optimizer=optimizer)


def test_stochastic_rounding_is_replayed_with_the_seed_of_its_run(tmp_path):
    settings = SRLORA | {"rounding": "stochastic"}
    case = Case("srlora", settings, steps=STEPS, bf16=True)
    plan = told(case, torch.bfloat16, 0, 1, 2)
    weights = []
    for seed in (7, 42):
        adapted = adapted_network(case)
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE, weight_decay=0.0)
        if seed == 7:
            distlora.initialise(adapted, optimizer=optimizer, **plan | {"seed": seed})
            for _ in range(2):
                (batch,) = batches(adapted.steps, BATCH, torch.bfloat16, 0, 1, 1)
                loss = loss_of(adapted.model, batch)
                loss.backward()
                adapted.before_step()
                optimizer.step()
                adapted.after_step(loss)
            distlora.save(adapted, tmp_path)
        else:
            distlora.load(adapted, None, tmp_path, optimizer=optimizer, **plan | {"seed": seed})
        weights.append(adapted.layers["second"].weight.clone())
    assert torch.equal(*weights)


# ---------------------------------------------------------------------- mistakes


def test_wrong_names_and_settings_name_the_nearest():
    net = nn.Sequential(nn.Linear(8, 8))
    with refused("no method is called lora_bs", "did you mean lora_"):
        distlora.attach(net, "lora_bs")
    with refused("lora_sb", "rnak", "did you mean rank"):
        distlora.attach(net, "lora_sb", rnak=4)
    with refused("lora_sb: init: eta must be positive"):
        distlora.attach(net, "lora_sb", init={"eta": -1.0})
    with refused("rank 9"):
        distlora.attach(net, "lora", rank=9)
    with refused("no linear layer"):
        distlora.attach(nn.Sequential(nn.Conv2d(3, 3, 3)), "lora")


def test_calls_in_the_wrong_order_are_one_sentence(tmp_path):
    adapted = adapted_network(Case("lora", {"rank": 4}))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE)
    for call in (
        adapted.before_step,
        adapted.after_step,
        lambda: distlora.save(adapted, tmp_path),
        lambda: distlora.export(adapted, tmp_path / "out"),
    ):
        with refused("call distlora.initialise or distlora.load first"):
            call()
    distlora.initialise(adapted, optimizer=optimizer)
    with refused("already"):
        distlora.initialise(adapted, optimizer=optimizer)
    with refused("after_step was called without before_step"):
        adapted.after_step()
    with refused("empty|no complete checkpoint|already"):
        distlora.load(adapted, None, tmp_path, optimizer=optimizer)
    loss_of(adapted.model, batches(0, BATCH, FP32, 0, 1, 1)[0]).backward()
    adapted.before_step()
    with refused("before_step was called twice"):
        adapted.before_step()


def test_what_initialise_lacks_is_named():
    with refused("optimizer="):
        distlora.initialise(adapted_network(Case("lora", {"rank": 4})))
    adapted = adapted_network(Case("lora_sb", {"rank": 4}))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE)
    with refused("probe=batches"):
        distlora.initialise(adapted, optimizer=optimizer)
    with refused("loss="):
        distlora.initialise(adapted, optimizer=optimizer, probe=[1, 2])
    with refused("at least one"):
        distlora.initialise(adapted, optimizer=optimizer, probe=[], loss=loss_of)
    adapted = adapted_network(Case("lora_sb", {"rank": 4, "init": {"eta": "schedule"}}))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE)
    with refused("first_rate="):
        distlora.initialise(adapted, optimizer=optimizer, probe=batches(0, 4, FP32, 0, 1, 2), loss=loss_of)
    adapted = adapted_network(Case("srlora", SRLORA))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE)
    with refused("steps="):
        distlora.initialise(adapted, optimizer=optimizer)


def test_an_optimizer_that_lacks_a_factor_or_is_unknown_is_refused():
    adapted = adapted_network(Case("lora", {"rank": 4}))
    with refused("does not train", "attach before"):
        distlora.initialise(adapted, optimizer=torch.optim.AdamW([adapted.parameters()[0]], lr=RATE))
    with refused("Adagrad", "not known"):
        distlora.initialise(adapted, optimizer=torch.optim.Adagrad(adapted.parameters(), lr=RATE))
    with refused("str is no DeepSpeed engine"):
        distlora.initialise(adapted, "engine")


def test_a_tensor_that_does_not_train_is_named_within_the_first_steps():
    adapted = adapted_network(Case("lora_xs", {"rank": 4}))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE)
    distlora.initialise(adapted, optimizer=optimizer)
    with pytest.raises(distlora.TrainingError, match="first.R was zero in 5 steps up to step 5"):
        for _ in range(6):
            adapted.model(batches(0, BATCH, FP32, 0, 1, 1)[0]["x"]).sum().backward()
            adapted.layers["first"].R.grad.zero_()
            adapted.before_step()
            optimizer.step()
            adapted.after_step()


def test_a_linear_layer_with_a_forward_of_its_own_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with refused("Scaled"):
        distlora.attach(nn.Sequential(Scaled(8, 8)), "lora", targets=["0"])
    attention = nn.MultiheadAttention(8, 2)
    with refused("out_proj"):
        distlora.attach(attention, "lora", targets=["out_proj"])


# ---------------------------------------------------------------------- nothing is half done


def test_a_refused_start_has_changed_nothing():
    adapted = adapted_network(Case("srlora", SRLORA))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE, weight_decay=0.0)
    before = adapted.layers["first"].weight.clone()
    with refused("steps="):
        distlora.initialise(adapted, optimizer=optimizer)
    assert torch.equal(adapted.layers["first"].weight, before)
    distlora.initialise(adapted, optimizer=optimizer, steps=STEPS)
    assert not torch.equal(adapted.layers["first"].weight, before)


def test_a_start_that_broke_off_is_not_gone_on_with():
    adapted = adapted_network(Case("lora_sb", {"rank": 4}))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE)

    def broken(net, batch):
        raise RuntimeError("the loss broke")

    probe = batches(0, 4, FP32, 0, 1, 2)
    with pytest.raises(RuntimeError, match="the loss broke"):
        distlora.initialise(adapted, optimizer=optimizer, probe=probe, loss=broken)
    with refused("broke off", "newly loaded model"):
        distlora.initialise(adapted, optimizer=optimizer, probe=probe, loss=loss_of)


def test_batches_that_can_be_read_once_serve_every_recomposition():
    settings = {"rank": 4, "init": {"eta": 1e-2}, "recompose": {"interval": 2}}
    adapted = adapted_network(Case("lora_sb", settings))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE)
    once = iter(batches(0, 4, FP32, 0, 1, 2))
    distlora.initialise(adapted, optimizer=optimizer, probe=once, loss=loss_of, steps=STEPS)
    for _ in range(STEPS):
        step(adapted, optimizer)


def test_a_probe_that_only_a_recomposition_needs_is_asked_for_at_the_start():
    adapted = adapted_network(Case("srlora", SRLORA | {"refill": "gradient"}))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE, weight_decay=0.0)
    with refused("probe=batches"):
        distlora.initialise(adapted, optimizer=optimizer, steps=STEPS)


def test_saving_amid_a_step_is_refused(tmp_path):
    adapted, optimizer = started()
    loss_of(adapted.model, batches(0, BATCH, FP32, 0, 1, 1)[0]).backward()
    adapted.before_step()
    with refused("between before_step and after_step"):
        distlora.save(adapted, tmp_path)


def test_modules_that_the_user_put_into_evaluation_mode_stay_in_it():
    net = nn.Sequential(nn.Linear(23, 16), nn.Dropout(0.5), nn.Linear(16, 7))
    net.train()
    net[1].eval()
    adapted = distlora.attach(net, "lora_sb", rank=2)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE)
    distlora.initialise(adapted, optimizer=optimizer, probe=batches(0, 4, FP32, 0, 1, 2), loss=loss_of)
    assert [module.training for module in net] == [True, False, True]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "lora_pro"])
def test_a_warm_up_from_rate_zero_is_no_tensor_that_does_not_train(method):
    adapted = adapted_network(Case(method, {"rank": 4}))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE, weight_decay=0.0)
    distlora.initialise(adapted, optimizer=optimizer)
    for rate in (0.0, RATE, RATE):
        for group in optimizer.param_groups:
            group["lr"] = rate
        step(adapted, optimizer)
    assert adapted.layers["first"].B.any()


def test_the_first_rate_of_a_warm_up_from_zero_is_the_first_above():
    case = Case("lora_sb", {"rank": 4, "init": {"eta": "schedule"}})
    adapted = adapted_network(case)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE)
    plan = {"probe": batches(0, 4, FP32, 0, 1, 2), "loss": loss_of}
    report = distlora.initialise(adapted, optimizer=optimizer, first_rate=lambda step: step * 1e-3, **plan)
    assert report.scalars["eta"] == 1e-3
    adapted = adapted_network(case)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE)
    with refused("first_rate is 0"):
        distlora.initialise(adapted, optimizer=optimizer, first_rate=0.0, **plan)


def test_what_the_recipes_checks_refuse_the_calls_refuse_too():
    adapted = adapted_network(Case("pissa", {"rank": 4}))
    with refused("pissa", "weight_decay=0.01"):
        distlora.initialise(adapted, optimizer=torch.optim.AdamW(adapted.parameters(), lr=RATE))
    first, *rest = adapted.parameters()
    groups = [{"params": [first], "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.02}]
    assert spec_of(OptimizerSpec("adamw8bit", weight_decay=0.03).build(rest)).weight_decay == 0.03
    with refused("pissa", "weight_decay=0.02"):
        distlora.initialise(adapted, optimizer=torch.optim.AdamW(groups))
    with refused("the optimizer LBFGS keeps a state"):
        distlora.initialise(adapted, optimizer=torch.optim.LBFGS(list(adapted.parameters())))
    adapted = adapted_network(Case("srlora", SRLORA | {"interval": 50}))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE, weight_decay=0.0)
    with refused("interval=50"):
        distlora.initialise(adapted, optimizer=optimizer, steps=10)
    adapted = adapted_network(Case("lora", {"rank": 4}))
    with refused("clip= is for methods that transform gradients"):
        distlora.initialise(adapted, optimizer=torch.optim.AdamW(adapted.parameters()), clip=1.0)


def test_parameters_to_be_trained_whole_must_exist():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    with refused("no parameter 1.wieght", "did you mean 1.weight"):
        distlora.attach(net, "lora", rank=2, also_train=["1.wieght"])
    with refused("one text"):
        distlora.attach(net, "lora", rank=2, also_train="1.weight")
    assert list(distlora.attach(net, "lora", rank=2, targets="0").layers) == ["0"]
    with refused("adapter layers already"):
        distlora.attach(net, "lora", rank=2)


def test_a_class_that_computes_the_same_in_its_own_words_is_adapted():
    class Wordy(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + (0 if self.bias is None else self.bias)

    assert list(distlora.attach(nn.Sequential(Wordy(8, 8)), "lora", rank=2).layers) == ["0"]
