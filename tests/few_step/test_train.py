"""The trainer on a small U-Net: killed and gone on to the same bytes, the best of the validations, what is refused."""

import copy
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler
from quantized import quantized_unet
from torch.nn.functional import interpolate
from torch.testing import assert_close
from unets import small_unet

from vqdm.config.few_step import FewStepConfig
from vqdm.config.options import FinetuneConfig
from vqdm.distillation.end_to_end import optimizer_of
from vqdm.distillation.moving_codes import let_drift, stop_drifting
from vqdm.distillation.parameters import trained_parameters
from vqdm.distillation.trajectories import Trajectories
from vqdm.errors import UserError
from vqdm.few_step.adapters import add_adapter
from vqdm.few_step.pairs import pack_pairs, read_pairs
from vqdm.few_step.train import Training, stored

SCHEDULER = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
FEW = {"steps": 6, "batch_size": 4, "check_every": 2, "warmup": 1, "precision": "float32", "learning_rate": 1e-3}


def write_pairs(path, *, count: int = 8, seed: int = 0) -> Trajectories:
    """Pairs as a guided sampling records them: rows without caption first."""
    draw = torch.Generator().manual_seed(seed)
    noise, clean = torch.randn(2, count, 4, 8, 8, generator=draw)
    text = torch.randn(count, 3, 32, generator=draw)
    call = {"sample": noise.repeat(2, 1, 1, 1), "timestep": torch.tensor(951)}
    call |= {"encoder_hidden_states": torch.cat([torch.zeros_like(text), text])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack_pairs(call | {"output": torch.zeros(2 * count, 4, 8, 8)}, clean))
    return Trajectories([path])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pairs")
    return write_pairs(directory / "a.safetensors"), write_pairs(directory / "b.safetensors", count=3, seed=1)


def training(directory, files, **changes) -> Training:
    unet = small_unet()
    config = FewStepConfig(**(FEW | {"kind": "direct"} | changes))
    student, more = copy.deepcopy(unet), {}
    if config.kind == "hipa":
        optimizer = add_adapter(student, rank=2, seed=0, rate=config.learning_rate)
        more = {"optimizer": optimizer, "decode": lambda latents: interpolate(latents[:, :3], scale_factor=2.0)}
    return Training(student, unet, *files, scheduler=SCHEDULER, config=config, directory=directory, **more)


def of_codes(directory, files, **changes) -> Training:
    """Distribution matching of a quantized student: scales, biases and norms train, and codes move."""
    config, own = FewStepConfig(**(FEW | changes | {"learning_rate": 0.02})), FinetuneConfig(code_rate=20.0)
    student = quantized_unet("rtn")
    drifting = let_drift(student)
    optimizer = optimizer_of(trained_parameters(student, own.train, code_rate=own.code_rate), own)
    more = {"optimizer": optimizer, "after_step": lambda _step: [weight.settle() for weight in drifting.values()]}
    return Training(student, small_unet(), *files, scheduler=SCHEDULER, config=config, directory=directory, **more)


def test_pairs_are_read_with_their_own_captions(files):
    draw = torch.Generator().manual_seed(0)
    noise, clean = torch.randn(2, 8, 4, 8, 8, generator=draw)
    text = torch.randn(8, 3, 32, generator=draw)
    pairs = read_pairs(files[0], [5, 2], device="cpu")
    assert_close(pairs.noise, noise[[5, 2]])
    assert_close(pairs.clean, clean[[5, 2]])
    assert_close(pairs.captions["encoder_hidden_states"], text[[5, 2]])
    assert not pairs.empty["encoder_hidden_states"].any()


@pytest.mark.parametrize("kind", ["direct", "reflow", "lcm", "dmd", "fdistill", "hipa", "codes"])
def test_a_killed_training_goes_on_to_the_same_bytes(kind, files, tmp_path, monkeypatch):
    of_kind = {"codes": partial(of_codes, kind="dmd"), "dmd": partial(training, kind="dmd", critic_first=3)}
    make = partial(of_kind.get(kind, partial(training, kind=kind)), keep="last")
    whole, history = make(tmp_path / "whole", files).run()
    stopped, save = make(tmp_path / "killed", files), Training._save

    def killed(self, seen):
        save(self, seen)
        if seen.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    monkeypatch.setattr(Training, "_save", save)
    resumed, again = make(tmp_path / "killed", files).run()
    assert (again.losses, again.validations) == (history.losses, history.validations)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == 1


def test_a_quantized_students_codes_move_and_nothing_but_what_trains_changes(files, tmp_path):
    before, made = quantized_unet("rtn"), of_codes(tmp_path, files, kind="dmd", keep="last", average=0.0)
    trained = set(made.learners[0].names.values())
    student, _ = made.run()
    stop_drifting(student)
    changed = {name for name, tensor in stored(student).items() if not torch.equal(tensor, stored(before)[name])}
    assert any(name.endswith("codes") for name in changed) and any(name.endswith("scales") for name in changed)
    names = {name.replace(".weight.inner.", ".weight.") for name in trained}
    assert {name for name in changed if not name.endswith("codes")} <= names


@pytest.mark.parametrize("kind", ["direct", "reflow"])
def test_a_student_gets_nearer_to_the_teachers_images(kind, files, tmp_path):
    steps = {"steps": 30, "check_every": 10, "average": 0.5}
    own = (files[0], files[0])  # what it has seen: this world is noise, which does not generalise
    _, history = training(tmp_path, own, kind=kind, **steps).run()
    assert history.best["distance"] < 0.9 * history.validations[0]["distance"]


@pytest.mark.parametrize(("count", "learned"), [(20, 4), (21, 3), (7, 1)])
def test_consistencys_grid_holds_the_students_own_steps(count, learned, files, tmp_path):
    made = training(tmp_path, files, kind="lcm", solver_steps=count, learned_steps=learned)
    grid = made._grid()
    assert len(grid.times) == count and grid.times[0] == 999 and float(grid.levels[-1]) == 1
    made.scheduler.set_timesteps(learned)
    assert grid.times[:: grid.every].tolist() == made.scheduler.timesteps.tolist()


@pytest.mark.parametrize("aim", ["average", "student"])
def test_consistencys_aim_is_the_students_average_or_the_student(aim, files, tmp_path):
    """An average that is no number is in the loss if it is the aim, and only then."""
    made = training(tmp_path, files, kind="lcm", aim=aim)
    next(iter(made.average.parameters())).data.fill_(torch.nan)
    loss = made.learners[0].loss_of(torch.Generator().manual_seed(0))
    assert bool(torch.isnan(loss)) == (aim == "average")


def test_a_solvers_steps_that_the_students_do_not_fall_on_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"solver_steps=20 is no multiple of .*learned_steps=3 .*: give 21") as error:
        FewStepConfig(kind="lcm", learned_steps=3).check()
    assert "\n" not in str(error.value)


def test_the_best_of_the_validations_is_kept(files, tmp_path, monkeypatch):
    states, distance = [], iter([3.0, 1.0, 2.0, 5.0])

    def found(self):
        states.append(copy.deepcopy(self.average.state_dict()))
        return next(distance)

    monkeypatch.setattr(Training, "_distance", found)
    student, history = training(tmp_path, files).run()
    assert history.best["step"] == 2
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in student.state_dict().items())


def test_the_critic_of_matching_follows_the_student_and_the_teacher_stays(files, tmp_path):
    made = training(tmp_path, files, kind="dmd", steps=2)
    before = small_unet().state_dict()
    made.run()
    student, critic = (learner.network.state_dict() for learner in made.learners)
    assert any(not torch.equal(student[name], before[name]) for name in before)
    assert any(not torch.equal(critic[name], before[name]) for name in before)
    state = made.learners[1].optimizer.state
    assert {float(own["step"]) for own in state.values()} == {4.0}, "two of its steps for each of the student's"


def test_the_critic_may_learn_before_the_students_first_step(files, tmp_path):
    made = training(tmp_path, files, kind="dmd", steps=2, critic_first=5)
    start, order = stored(copy.deepcopy(made.learners[0].network)), []
    for learner in made.learners:

        def noted(number, generator, *, config, learner=learner, step=learner.step):
            order.append(learner.name)
            if learner is made.learners[1] and len(order) <= 5:
                student = stored(made.learners[0].network)
                assert all(torch.equal(student[name], start[name]) for name in start)
            return step(number, generator, config=config)

        learner.step = noted
    made.run()
    assert order == ["critic"] * 5 + ["critic", "critic", "student"] * 2


def test_a_loss_that_is_not_finite_is_one_line(files, tmp_path):
    made = training(tmp_path, files, learning_rate=10.0, warmup=0)
    next(iter(made.learners[0].names)).data.fill_(torch.nan)
    with pytest.raises(UserError, match=r"loss is nan at step 0: lower few_step\.learning_rate"):
        made.run()


def test_divergences_without_a_discriminator_are_refused_in_one_line():
    with pytest.raises(UserError, match="js needs a discriminator: give few_step=fdistill") as error:
        FewStepConfig(kind="dmd", divergence="js").check()
    assert "\n" not in str(error.value)
