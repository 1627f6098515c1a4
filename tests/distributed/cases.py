"""What the ranks of a distributed test do, by name. Every case runs on any engine, and answers with tensors.

`reference` runs the same case on LocalEngine in the test's own process: that is the meaning which ZeRO must
reproduce.
"""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distlora.checkpoints.directory import newest
from distlora.checkpoints.restore import restore
from distlora.checkpoints.save import save
from distlora.data import Question, Questions, collate, collate_labelled, micro_batches, shard
from distlora.engine import boundary
from distlora.engine.comm import Comm
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.engine.owners import assign_owners
from distlora.engine.protocol import Engine
from distlora.evaluation.answering import Generation, Likelihood
from distlora.evaluation.scoring import answer_questions, label_scores, ready_to_answer
from distlora.exports.merged import export_merged_from_engine
from distlora.initialisation.factors import initialise, install_gradient_maps
from distlora.initialisation.probe import Probe, mean_gradients
from distlora.maths.low_rank import LowRank
from distlora.methods.dora import DoRA
from distlora.models.causality import sees_later_tokens
from distlora.models.generation import generate
from distlora.models.losses import label_loss, response_loss
from distlora.models.targets import loss_of_samples
from distlora.training.step import accumulate, evaluation_loss
from tests.distributed.dropped_step_cases import dropping
from tests.distributed.packing_cases import packed_rows
from tests.distributed.plan import GLOBAL_BATCH
from tests.distributed.rate_search_cases import searching
from tests.distributed.recomposition_cases import (
    Collectives,
    swap_resuming,
    swap_saving,
    swap_traffic,
    swapping,
    whole_run,
)
from tests.distributed.sums import worst_sum
from tests.distributed.traffic_cases import sent_at_the_start, sent_in_a_step
from tests.distributed.world import (
    batch_of_images,
    build,
    images_with_labels,
    labelled_samples,
    samples,
    share,
    write_random_factors,
)
from tests.stepping import take_step, train_step

Results = dict[str, Tensor]
RATE = 1e-2
#: Optimizers that a setting may name; without one it is AdamW.
SPECS = {
    "sgd": OptimizerSpec("sgd", lr=RATE, momentum=0.9),
    "lora_plus": OptimizerSpec(lr=RATE, lora_plus_ratio=4.0),
    "adamw8bit": OptimizerSpec("adamw8bit", lr=RATE),
    "paged_adamw": OptimizerSpec("paged_adamw", lr=RATE),
    "adamw8bit_lora_plus": OptimizerSpec("adamw8bit", lr=RATE, lora_plus_ratio=4.0),
}


class Setting:
    """One engine to be tried: where it runs, how samples are cut up, and what is trained."""

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        work: Path,
        micro_batch: int = 1,
        clip: float = 0.0,
        **build_settings,
    ):
        self.engine, self.comm, self.work = engine, engine.comm, work
        self.directory, self.build_settings = directory, build_settings
        self.micro_batch, self.clip = micro_batch, clip
        self.accumulation = GLOBAL_BATCH // (micro_batch * engine.comm.world_size)
        self.loaded_copies = 0.0
        self.attached = build(engine, directory, when_loaded=self._count, **build_settings)

    def anew(self) -> "Setting":
        """The same on an engine of its own, as a second start of the program would make it."""
        old = self.engine
        local = isinstance(old, LocalEngine)
        engine = LocalEngine(old.comm, old.dtype, old.clip) if local else type(old)(old.comm, old._config)
        return Setting(engine, self.directory, self.work, self.micro_batch, self.clip, **self.build_settings)

    def _count(self, model: nn.Module) -> None:
        self.loaded_copies = self.copies(model)

    def copies(self, model: nn.Module) -> float:
        """How many elements this group of ranks holds, as a multiple of the model's size."""
        held = whole = 0
        for parameter in model.parameters():
            held += parameter.numel() + (
                parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else 0
            )
            whole += getattr(parameter, "ds_numel", parameter.numel())
        (total,) = self.comm.sum(held)
        return total / whole

    def wanted_copies(self) -> int:
        return 1 if getattr(self.engine, "stage", 0) == 3 else self.comm.world_size

    def kept(self) -> Tensor:
        """Copies of the model that this group of ranks holds now, as a multiple of what it should."""
        return torch.tensor(self.copies(self.engine.module) / self.wanted_copies())

    def rate(self, step: int) -> float:
        """Never the one that the optimizer was made with."""
        return RATE * (0.5 if step % 2 else 1.5)

    def batches(self, seed: int, count: int = GLOBAL_BATCH):
        return share(self.comm, samples(count, seed), self.micro_batch, self.accumulation)

    def steps(self, first: int, last: int) -> tuple[list[float], list[float]]:
        losses, norms = [], []
        for step in range(first, last):
            loss, info = train_step(self.engine, self.batches(step), response_loss, self.rate(step))
            losses.append(loss)
            norms.append(info.grad_norm)
        return losses, norms

    def evaluation(self, count: int = 10) -> float:
        rows = samples(count, 99)
        parts = shard(count, self.comm.rank, self.comm.world_size, self.micro_batch)
        batches = [collate([rows[i] for i in part], 0, self.comm.device) for part in parts]
        return evaluation_loss(self.engine, batches, response_loss)

    def start_from_random_factors(self) -> None:
        write_random_factors(self.engine, self.attached)
        install_gradient_maps(self.engine, self.attached)

    def gradients(self) -> Results:
        """The averaged gradients of all trained factors, of a step that changes nothing."""
        found = {}

        def look(layer, gradients, factors):
            found.update(
                {f"{layer.name}.{factor}": gradient.cpu().clone() for factor, gradient in gradients.items()}
            )
            return {}

        self.engine.set_rate(0.0)
        accumulate(self.engine, self.batches(0), response_loss)
        self.engine.map_gradients(list(self.attached.layers.values()), look)
        take_step(self.engine)
        return found

    def factors(self) -> Results:
        return {
            f"{name}.{factor}": value.float().cpu().clone()
            for name, layer in self.attached.layers.items()
            for factor, value in self.engine.read(layer).items()
        }

    def state(self) -> Results:
        return self.factors() | {"steps_taken": torch.tensor(self.engine.steps_taken())}

    def probe_data(self, count: int, micro_batch: int) -> Probe:
        rows = samples(count, 7)
        parts = shard(count, self.comm.rank, self.comm.world_size, micro_batch)
        batches = [collate([rows[i] for i in part], 0, self.comm.device) for part in parts]
        return Probe(lambda: iter(batches), lambda: iter(batches), count, loss_of_samples(response_loss))


def _curve(losses: list[float], norms: list[float], *rest: float) -> Results:
    return {"losses": torch.tensor([*losses, *rest]), "norms": torch.tensor(norms)}


def curve(setting: Setting, steps: int = 12) -> Results:
    """Training from factors that are not zero, past the first step, then an evaluation."""
    if setting.attached.layers:
        setting.start_from_random_factors()
    losses, norms = setting.steps(0, steps)
    return _curve(losses, norms, setting.evaluation()) | setting.state()


def later_tokens(setting: Setting) -> Results:
    """A causal model, asked whether its tokens see later ones."""
    setting.engine.train_mode(False)
    return {"seen": setting.engine.run(sees_later_tokens).cpu()}


def short_batch(setting: Setting) -> Results:
    """Global batches that leave ranks without a sample: weight-zero passes."""
    setting.start_from_random_factors()
    losses = [
        train_step(setting.engine, setting.batches(step, count), response_loss, RATE)[0]
        for step, count in enumerate((1, 5, 2))
    ]
    return _curve(losses, [], setting.evaluation(1), setting.evaluation(50))


def writing(setting: Setting) -> Results:
    """Writes between two forward passes without a backward between them, and between two steps."""
    setting.start_from_random_factors()
    losses = [setting.evaluation()]
    for layer in setting.attached.layers.values():
        factors, last = setting.engine.read(layer), layer.method.trains[-1]
        setting.engine.write(layer, {last: -2 * factors[last].float(), "B": 0.5 * factors["B"].float()})
    losses.append(setting.evaluation())
    # Once DeepSpeed has seen a backward pass it keeps every weight gathered for it, after an evaluation too.
    losses += [*setting.steps(0, 3)[0], setting.evaluation()]
    for layer in setting.attached.layers.values():
        last = layer.method.trains[-1]
        setting.engine.write(layer, {last: 1.5 * setting.engine.read(layer)[last]})
    losses.append(setting.evaluation())
    losses += setting.steps(3, 6)[0]
    return _curve(losses, [], setting.evaluation()) | setting.factors()


def norming(setting: Setting) -> Results:
    """How often DoRA takes the norms of its layers' rows: once after every change, whatever passes follow;
    and that it does so after each kind of change."""
    engine, layers = setting.engine, list(setting.attached.layers.values())
    setting.start_from_random_factors()
    taken, prepare = [], DoRA.prepare

    def count(method, weight, factors):
        taken[-1] += 1
        return prepare(method, weight, factors)

    def look() -> None:
        taken.append(0)
        losses.append(setting.evaluation())

    losses = []
    with mock.patch.object(DoRA, "prepare", count):
        look()  # after a write
        look()  # after nothing
        for step in range(2):
            taken.append(0)  # of the backward passes before a step: after nothing, then after a step
            losses += setting.steps(step, step + 1)[0]
        look()  # after a step
        for number, layer in enumerate(layers):
            generator = torch.Generator().manual_seed(number)
            pair = LowRank(
                *(
                    torch.randn(s, generator=generator) * 0.3
                    for s in ((layer.shape[0], 2), (2, layer.shape[1]))
                )
            )
            engine.add_low_rank(layer, pair, "nearest", 0)
        look()
        name = f"{layers[0].name}.weight"
        value = engine.read_parameter(name)
        engine.write_parameter(name, None if value is None else 2 * value)
        look()
        name = f"{layers[1].name}.m"
        tensors = engine.read_trained(name)
        engine.write_trained(name, tensors and {key: -2 * value for key, value in tensors.items()}, 2)
        look()
    assert taken == [len(layers), 0, 0, len(layers), len(layers), len(layers), 1, 1], taken
    return _curve(losses, []) | setting.factors() | {"taken": torch.tensor(taken)}


def replacing_gradients(setting: Setting) -> Results:
    """Other gradients between the last backward and the step, with clipping: losses and the reported norm
    follow them.
    """
    setting.start_from_random_factors()
    layers = list(setting.attached.layers.values())

    def change(layer, gradients, factors):
        return {name: 3 * gradient + gradient.flip(0) for name, gradient in gradients.items()}

    losses, norms = [], []
    for step in range(5):
        setting.engine.set_rate(setting.rate(step))
        losses.append(accumulate(setting.engine, setting.batches(step), response_loss))
        setting.engine.map_gradients(layers[::2], change)
        norms.append(take_step(setting.engine).grad_norm)
    return _curve(losses, norms, setting.evaluation()) | setting.factors()


def summing(setting: Setting) -> Results:
    """The sum of 64 micro-batches of very different size is that of their gradients in float64."""
    return {"right": torch.tensor(worst_sum(setting) <= 1e-3)}


def transform_traffic(setting: Setting) -> Results:
    """Transforming gradients costs one all-reduce a bucket of layers, of the gradients and of factors that
    are cut up, and one of a number for the norm."""
    engine, layers = setting.engine, list(setting.attached.layers.values())
    setting.start_from_random_factors()
    elements = sum(layer.method.rank * (layer.in_features + layer.out_features) for layer in layers)
    seen = {}
    for what in ("one bucket", "a bucket a layer", "step", "plain step"):
        accumulate(engine, setting.batches(0), response_loss)
        with (
            Collectives() as seen[what],
            mock.patch("distlora.engine.zero.gradients.GRADIENT_BUCKET", 0 if "layer" in what else 1 << 24),
        ):
            if "bucket" in what:
                engine.map_gradients(layers, lambda layer, *given: layer.method.transform_gradients(*given))
        transformed = [] if what == "plain step" else layers
        with (
            Collectives() as stepping,
            mock.patch.object(boundary, "transforming", return_value=transformed),
        ):
            take_step(engine)
        if "step" in what:
            seen[what] = stepping
    if setting.comm.world_size > 1:
        bytes_sent = 4 * elements * (2 if engine.stage == 3 else 1)
        assert seen["one bucket"].calls == {"allreduce_": 1} and seen["one bucket"].bytes == {
            "allreduce_": bytes_sent
        }
        assert seen["a bucket a layer"].calls == {"allreduce_": len(layers)}
        assert seen["a bucket a layer"].bytes == {"allreduce_": bytes_sent}
        assert seen["step"].calls - seen["plain step"].calls == {"allreduce_": 2}
    return {"steps_taken": torch.tensor(engine.steps_taken())}


def initialising(setting: Setting, count: int = 10, probe_micro_batch: int = 1) -> Results:
    """The whole initialisation, then a few steps."""
    data = setting.probe_data(count, probe_micro_batch)
    report = initialise(setting.engine, setting.attached, seed=3, first_rate=RATE, data=data)
    updates = {}
    for name, layer in setting.attached.layers.items():
        factors = {factor: value.float() for factor, value in setting.engine.read(layer).items()}
        pair = setting.attached.method.delta(factors)
        updates[f"update.{name}"] = (pair.left @ pair.right).cpu()
    losses, norms = setting.steps(0, 3)
    told = {key: torch.tensor(value) for key, value in report.scalars.items()}
    return _curve(losses, norms) | updates | told


def probing(
    setting: Setting,
    count: int = 5,
    probe_micro_batch: int = 1,
    block_elements: int = 700,
    released: bool = False,
) -> Results:
    """The probe's gradients, and a training curve with a probe in the middle.

    released: nothing may be left gathered after it.
    """
    setting.start_from_random_factors()
    losses = setting.steps(0, 2)[0]
    layers, comm = setting.attached.layers, setting.comm
    owners = assign_owners(layers, setting.attached.method, comm.world_size)
    data = setting.probe_data(count, probe_micro_batch)
    found = mean_gradients(
        setting.engine, layers, owners, data.batches(), count, data.loss, block_elements=block_elements
    )
    if released:
        assert setting.kept() < 1.05, f"{setting.kept():.2f} copies of the model after the probe"
    gradients = {}
    for name, layer in layers.items():
        whole = found.get(name, torch.zeros(layer.shape))
        gradients[f"gradient.{name}"] = comm.broadcast(whole.contiguous(), owners[name])
    losses += setting.steps(2, 5)[0]
    return _curve(losses, []) | gradients


def generating(setting: Setting) -> Results:
    """Generation in the middle of training, over the whole model, after an evaluation that left weights
    gathered.
    """
    setting.start_from_random_factors()
    losses = [*setting.steps(0, 2)[0], setting.evaluation()]
    setting.engine.train_mode(False)
    prompts = [row.prompt_ids for row in samples(4, 11)]
    with setting.engine.whole_model() as gathered:
        assert gathered
        # Ranks whose answers end early make fewer passes, here none: the weights must lie there without
        # anyone's help.
        answers = generate(setting.engine.module, prompts, 6, {96}, pad_id=0) if setting.comm.is_main else []
    setting.engine.train_mode(True)
    losses += setting.steps(2, 4)[0]
    padded = torch.tensor([answer + [0] * (6 - len(answer)) for answer in answers])
    return _curve(losses, []) | {"answers": padded}


class Numbers:
    """A tokenizer whose texts are the numbers of the tokens. end: the token that ends an answer."""

    pad_token_id = 0

    def __init__(self, end: int):
        self.eos_token_id = end

    def decode(self, tokens, skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, tokens))


def answering(setting: Setting, count: int = 5, end: int = 96, fits: bool = False) -> Results:
    """Questions spread over ranks, generated and chosen, in batches of any size. Where no rank can hold the
    model whole, every token is a collective, and whoever is done goes on for the others. At last adapters are
    folded in, where there is room.

    end: a token that ends some of the answers early.
    """
    setting.start_from_random_factors()
    losses = setting.steps(0, 2)[0]
    engine, options = setting.engine, ((5, 9, 12), (7,))
    items = [Question("", row.prompt_ids, "", options, 0) for row in samples(count, 11)]
    asked = Questions(items, (), "", 0, "")

    def answers(batch_size: int, fold: bool = False) -> Results:
        ways = Generation(engine, Numbers(end), "text", asked, 4), Likelihood(engine, Numbers(end), "", asked)
        records: list[list[dict]] = [[], []]
        with (
            mock.patch.object(engine, "_fits", return_value=fits, create=True),
            ready_to_answer(engine, fold) as agree,
        ):
            assert (agree is None) == (fits or getattr(engine, "stage", 0) < 3)
            for way, found in zip(ways, records):
                answer_questions(way, range(count), agree, found.extend, batch_size)
        texts, chosen = (sorted(found, key=lambda record: record["index"]) for found in records)
        assert [record["index"] for record in texts] == [record["index"] for record in chosen]
        tokens = [[int(word) for word in record["output"].split()] for record in texts]
        return {
            "answers": torch.tensor([row + [0] * (4 - len(row)) for row in tokens]),
            "lengths": torch.tensor([len(row) for row in tokens]),
            "likelihoods": torch.tensor([record["log_likelihoods"] for record in chosen]),
        }

    found = answers(1)
    losses += setting.steps(2, 4)[0]
    later = {f"{name}_later": value for name, value in answers(2, fold=True).items()}
    return _curve(losses, []) | found | later


def naming_silent_tensors(setting: Setting) -> Results:
    """A tensor whose gradient is zero is named; the others are not."""
    setting.start_from_random_factors()
    quiet = list(setting.attached.layers)[4]
    layer = setting.attached.layers[quiet]
    setting.engine.write(layer, {"B": torch.zeros(layer.out_features, 7)})
    accumulate(setting.engine, setting.batches(0), response_loss)
    silent = setting.engine.silent_tensors()
    take_step(setting.engine)
    return {"right": torch.tensor(silent == {f"{quiet}.R": "zero"})}


def classifying(setting: Setting, steps: int = 4, labels: int = 3) -> Results:
    """A classifier's new head as it is drawn, training with a last batch that leaves ranks without a row, and
    the scores.
    """
    engine, comm = setting.engine, setting.comm
    drawn = {}
    for name in engine.trained_shapes():
        if name.startswith(("classifier", "bert.pooler")):
            master, used = engine.read_trained(name), engine.read_parameter(name)
            if comm.is_main:
                drawn |= {f"drawn.{name}": master["master"], f"used.{name}": used.float().clone()}
    setting.start_from_random_factors()
    losses, norms = [], []
    for step in range(steps):
        rows = labelled_samples(GLOBAL_BATCH if step + 1 < steps else 1, labels, step)
        parts = micro_batches(
            range(len(rows)), comm.rank, comm.world_size, setting.micro_batch, setting.accumulation
        )
        batches = [collate_labelled([rows[i] for i in part], 0, comm.device) for part in parts]
        loss, info = train_step(engine, batches, label_loss, setting.rate(step))
        losses.append(loss)
        norms.append(info.grad_norm)
    scores = label_scores(
        engine, labelled_samples(10, labels, 99), lambda part: collate_labelled(part, 0, comm.device),
        setting.micro_batch, ["accuracy"],
    )  # fmt: skip
    return _curve(losses, norms, scores["loss"]) | drawn | {"accuracy": torch.tensor(scores["accuracy"])}


def classifying_images(setting: Setting, steps: int = 3, labels: int = 3) -> Results:
    """The same of images; the last batch leaves ranks without one."""
    engine, comm, dtype = setting.engine, setting.comm, setting.engine.dtype
    setting.start_from_random_factors()
    losses, norms = [], []
    for step in range(steps):
        rows = images_with_labels(GLOBAL_BATCH if step + 1 < steps else 1, labels, step)
        parts = micro_batches(
            range(len(rows)), comm.rank, comm.world_size, setting.micro_batch, setting.accumulation
        )
        batches = [batch_of_images([rows[i] for i in part], dtype) for part in parts]
        loss, info = train_step(engine, batches, label_loss, setting.rate(step))
        losses.append(loss)
        norms.append(info.grad_norm)
    count, owners = 5, assign_owners(setting.attached.layers, setting.attached.method, comm.world_size)
    rows = images_with_labels(count, labels, 7)
    batches = [
        batch_of_images([rows[i] for i in part], dtype) for part in shard(count, comm.rank, comm.world_size)
    ]
    found = mean_gradients(
        engine, setting.attached.layers, owners, batches, count, loss_of_samples(label_loss)
    )
    gradients = {
        f"gradient.{name}": comm.broadcast(
            found.get(name, torch.zeros(layer.shape)).contiguous(), owners[name]
        )
        for name, layer in setting.attached.layers.items()
    }
    heads = {
        name: engine.read_parameter(name) for name in engine.trained_shapes() if name.startswith("classifier")
    }
    heads = {name: value.float().clone() for name, value in heads.items() if comm.is_main}
    return _curve(losses, norms) | gradients | heads | setting.state()


def saving(setting: Setting) -> Results:
    """Three steps, a checkpoint in `work`, three more."""
    setting.start_from_random_factors()
    losses = setting.steps(0, 3)[0]
    save(setting.engine, setting.attached, setting.work, 3, {"a": 1})
    losses += setting.steps(3, 6)[0]
    return _curve(losses, []) | setting.state()


def resuming(setting: Setting) -> Results:
    """The last three of those steps, from the newest checkpoint in `work`."""
    found = newest(setting.work, setting.comm)
    restore(setting.engine, setting.attached, found)
    install_gradient_maps(setting.engine, setting.attached)
    return _curve(setting.steps(3, 6)[0], []) | setting.state()


def correcting(setting: Setting) -> Results:
    """With the maps installed the optimizer is given the optimal gradient of R (Theorem 3), here by plain
    inverses.
    """
    setting.start_from_random_factors()
    corrected = setting.gradients()
    for layer in setting.attached.layers.values():
        layer.map_gradients({})
    plain = setting.gradients()
    for name, layer in setting.attached.layers.items():
        b, a = (setting.engine.read(layer)[factor].double().cpu() for factor in ("B", "A"))
        optimal = torch.linalg.inv(b.T @ b) @ plain[f"{name}.R"].double() @ torch.linalg.inv(a @ a.T)
        optimal /= setting.attached.method.scaling**2
        error = (corrected[f"{name}.R"] - optimal).abs().max() / optimal.abs().max()
        assert error < 1e-3, f"{name}: off by {error:.3g}"
    return corrected


def storing(setting: Setting) -> Results:
    """Under ZeRO-3 the group holds the model once, from the moment that it was loaded; at other stages once a
    rank.

    Weights that are to be packed are loaded whole."""
    packed = any(layer.packing for layer in setting.attached.layers.values())
    loaded = setting.comm.world_size if packed else setting.wanted_copies()
    assert setting.loaded_copies < loaded + 0.05, f"{setting.loaded_copies:.2f} copies after loading"
    return {"kept": setting.kept()}


def merging(setting: Setting, steps: int = 2) -> Results:
    """The weights of the merged model, after a start of its own and some steps."""
    engine, attached = setting.engine, setting.attached
    initialise(engine, attached, 3, RATE)
    losses, _ = setting.steps(0, steps)
    base = setting.directory / setting.build_settings.get("family", "")
    merged = export_merged_from_engine(engine, attached, setting.work / "merged", base, steps)
    return {"losses": torch.tensor(losses), **load_file(merged / "model.safetensors")}


CASES: dict[str, Callable[..., Results]] = {
    case.__name__: case
    for case in (
        curve, packed_rows, short_batch, writing, norming, replacing_gradients, initialising, probing,
        generating, answering, naming_silent_tensors, summing, transform_traffic, correcting, storing,
        classifying, classifying_images, saving, resuming, swapping, swap_traffic, swap_saving, swap_resuming,
        whole_run, sent_in_a_step, sent_at_the_start, searching, merging, later_tokens, dropping,
    )
}  # fmt: skip


def run(name: str, engine: Engine, directory: Path, work: Path, arguments: dict, **setting) -> Results:
    """One case on one engine. A spec may be given as its name."""
    if "spec" in setting:
        setting["spec"] = SPECS[setting["spec"]]
    return CASES[name](Setting(engine, directory, work, **setting), **arguments)


def solo() -> Comm:
    from distlora.engine.comm import Topology

    return Comm(Topology(), torch.device("cpu"), distributed=False)
