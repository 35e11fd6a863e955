"""The environment: functional core, its three faces, and rollouts collected by TorchRL."""

from __future__ import annotations

import warnings

import gymnasium
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import check_env_specs
from torchrl.envs.libs.gym import GymWrapper

import envs  # noqa: F401  registers ardrag/ARVideo-v0
from data.draws import Stream, normals
from envs.ar_video import STATE_KEYS, frame_reward, snapshot, start, step
from envs.gymnasium_env import ARVideoEnv, ARVideoVectorEnv
from envs.rollout import RolloutCollector, assemble_rollout
from envs.torchrl_env import TorchRLEnv
from envs.toy import ToySource, best_velocity
from envs.transitions import CPS, ODE, log_prob

TABLE = (1.0, 0.755, 0.522, 0.0)


class CPSPolicy:
    """The best velocity plus an error, CPS where the state says stochastic; remembers the states it saw."""

    def __init__(self, error: float | torch.Tensor = 0.0) -> None:
        self.error = error
        self.seen: list[TensorDictBase] = []

    def __call__(self, state: TensorDictBase) -> TensorDictBase:
        self.seen.append(state.select(*STATE_KEYS).clone())
        x, v, sigma, after = best_velocity(state)
        m, n = int(state["frame"][0]), int(state["step"][0])
        random = state["stochastic"][:, m, n].view(-1, 1, 1, 1)
        mean, std = CPS().moments(x, v + self.error, sigma, after)
        flat, zero = ODE().moments(x, v + self.error, sigma, after)
        mean, std = torch.where(random, mean, flat), torch.where(random, std, zero)
        noise = normals(Stream.TRANSITION_NOISE, [(*k, m, n) for k in state["key"].tolist()], x.shape[1:])
        action = mean + std * noise
        value = log_prob(action, mean, std).unsqueeze(-1)
        return state.update({"action": action, "log_prob": value, "std": std.view(-1, 1)})


def act(source: ToySource, policy: CPSPolicy) -> tuple[list[TensorDictBase], list[torch.Tensor], list[torch.Tensor]]:
    """Run one episode on the bare core: states, actions, rewards."""
    state, done = source(), torch.tensor(False)
    states, actions, rewards = [state], [], []
    while not done.all():
        action = policy(state.clone())["action"]
        after, _, done = step(state, action)
        rewards.append(frame_reward(source.score, state, after))
        actions.append(action)
        states.append(after)
        state = after
    return states, actions, rewards


def test_core_walks_the_chain() -> None:
    source = ToySource(prompts=2, group=2)
    states, actions, rewards = act(source, CPSPolicy(error=0.1))
    assert [(int(s["frame"][0]), int(s["step"][0])) for s in states] == [(m, n) for m in range(3) for n in range(3)] + [
        (3, 0)
    ]
    for i, (before, after, action) in enumerate(zip(states, states[1:], actions, strict=False)):
        expected = before["latents"].clone()
        expected[:, i // 3] = action
        assert torch.equal(after["latents"], expected)
        assert (rewards[i] != 0).all() == (i % 3 == 2)
        for key in ("condition", "text", "sigma", "stochastic", "key"):
            assert torch.equal(after[key], before[key])


def test_step_leaves_its_argument_alone() -> None:
    state = ToySource()()
    copy = state.clone()
    step(state, torch.ones(1, 2, 4, 4))
    assert (state == copy).all()


def test_initial_noise_is_keyed() -> None:
    def noise(keys: list[list[int]], share: bool) -> torch.Tensor:
        b = len(keys)
        args = (torch.zeros(b, 3, 2, 4, 4), torch.zeros(b, 1, 1), torch.tensor(TABLE))
        flags = torch.zeros(1, 1, 1, dtype=torch.bool)
        return start(*args, flags, torch.tensor(keys), (2, 4, 4), share)["latents"]

    keys = [[1, 5, p, g] for p in range(2) for g in range(3)]
    shared, own = noise(keys, True).view(2, 3, -1), noise(keys, False).view(2, 3, -1)
    assert (shared == shared[:, :1]).all() and not torch.equal(shared[0], shared[1])
    rows = torch.cat([own.flatten(0, 1), shared[:, 0]])
    assert (torch.pdist(rows) > 1).all(), "every sample has noise of its own"
    assert torch.equal(noise(keys[4:5], False).flatten(), own[1, 1]), "another batch split draws the same"
    frames = noise(keys, False)[0].flatten(1)
    assert (torch.pdist(frames) > 1).all(), "every frame has noise of its own"
    big = noise([[0, 0, p, g] for p in range(40) for g in range(10)], False)
    assert abs(big.mean()) < 0.02 and abs(big.std() - 1) < 0.02


@pytest.mark.parametrize("table", [(1.0, 0.5), (1.0, 0.5, 0.5, 0.0), (0.0, 1.0, 0.0)])
def test_bad_noise_tables_are_refused(table: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must fall strictly and end at 0"):
        ToySource(sigmas=table)()


def test_disagreeing_shapes_are_refused() -> None:
    key, flags = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(1, 1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="disagree"):
        start(torch.zeros(2, 3, 2, 4, 4), torch.zeros(2, 1, 1), torch.tensor(TABLE), flags, key, (2, 8, 8))


def test_best_policy_of_the_toy_world_is_best() -> None:
    source = ToySource(prompts=3, group=2)
    best = torch.stack(act(source, CPSPolicy())[2])
    worse = torch.stack(act(source, CPSPolicy(error=0.2))[2])
    assert best.abs().max() < 1e-10 and (worse[2::3] < -1e-3).all()


def test_snapshot_is_the_state_the_policy_saw() -> None:
    source, policy = ToySource(prompts=2, group=2), CPSPolicy(error=0.3)
    collector = RolloutCollector(policy, source)
    collector.collect()
    policy.seen.clear()
    rollout = collector.collect()
    assert len(policy.seen) == 9
    for state in policy.seen:
        m, n = int(state["frame"][0]), int(state["step"][0])
        assert torch.equal(snapshot(rollout, m, n), state["latents"])


def test_rollout_is_the_episode_of_the_core() -> None:
    """Collected through TorchRL = the bare core, and the rollout has the agreed keys and shapes."""
    rollout = RolloutCollector(CPSPolicy(0.1), source := ToySource(prompts=2, group=2), source.score).collect()
    states, actions, rewards = act(twin := ToySource(prompts=2, group=2), CPSPolicy(0.1))
    assert twin.iteration == 1
    assert torch.equal(rollout["latents"][:, :, 0], states[0]["latents"])
    assert torch.equal(rollout["latents"][:, :, 1:].flatten(1, 2), torch.stack(actions, 1))
    assert torch.equal(rollout["latents"][:, :, -1], states[-1]["latents"])
    assert torch.equal(rollout["reward"], torch.stack(rewards[2::3], 1))
    assert torch.equal(rollout["prompt_id"], torch.tensor([0, 0, 1, 1]))
    assert {k: tuple(v.shape) for k, v in rollout.items()} == {
        "latents": (4, 3, 4, 2, 4, 4),
        "log_prob": (4, 3, 3),
        "stochastic": (4, 3, 3),
        "sigma": (4, 3, 4),
        "condition": (4, 3, 2, 4, 4),
        "text": (4, 1, 1),
        "key": (4, 4),
        "prompt_id": (4,),
        "reward": (4, 3),
        "std": (4, 3, 3, 1),
    }
    assert torch.equal(rollout["log_prob"] != 0, rollout["stochastic"])
    assert torch.equal(rollout["std"][..., 0] > 0, rollout["stochastic"])


def test_collecting_again_asks_the_source_once_each_time() -> None:
    source = ToySource(group=2)
    collector = RolloutCollector(CPSPolicy(0.1), source)
    assert source.iteration == 0
    rollouts = []
    for count in (1, 2, 3):
        rollouts.append(collector.collect())
        assert source.iteration == count
    assert [int(r["key"][0, 1]) for r in rollouts] == [0, 1, 2]
    assert "reward" not in rollouts[0]
    resumed = RolloutCollector(CPSPolicy(0.1), ToySource(group=2, iteration=2)).collect()
    assert (resumed == rollouts[2]).all(), "a collector made later continues bit for bit"


def test_collector_follows_a_source_that_changes_shape() -> None:
    source = ToySource()
    collector = RolloutCollector(CPSPolicy(), source, source.score)
    collector.collect()
    source.frames, source.side = 2, 6
    assert collector.collect()["latents"].shape == (1, 2, 4, 2, 6, 6)


def test_a_module_acts_with_its_present_weights_and_without_gradient() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(()))

        def forward(self, state: TensorDictBase) -> TensorDictBase:
            return CPSPolicy(self.bias)(state)

    source = ToySource()
    collector = RolloutCollector(module := Module(), source, source.score)
    assert collector.collect()["reward"].abs().max() < 1e-10
    module.bias.data.fill_(0.5)
    rollout = collector.collect()
    assert (rollout["reward"] < -1e-3).all() and not rollout["latents"].requires_grad


def test_steps_are_kept_without_copies_of_the_state() -> None:
    """What the collector holds after the last step is actions and scalars, not M * N states."""
    collector = RolloutCollector(CPSPolicy(), ToySource(frames=4, side=16))
    held: list[int] = []
    collector.collect()
    store = collector._steps
    add = store.add
    store.add = lambda data: (add(data), held.append(sum(s.bytes() for s in store.steps)))[0]  # type: ignore[method-assign]
    rollout = collector.collect()
    action = rollout["latents"][:, 0, 0].nbytes
    assert held[-1] < 12 * (action + 64)


def test_assemble_reads_torchrls_own_output() -> None:
    """The plain Collector, with everything it stores, gives the same rollout."""
    source = ToySource(group=2)
    first = ToySource(group=2)()
    env = TorchRLEnv(source, source.score)
    plain = Collector(env, CPSPolicy(0.1), frames_per_batch=18, total_frames=18, trust_policy=True)
    (data,) = list(plain)
    ours = RolloutCollector(CPSPolicy(0.1), twin := ToySource(group=2), twin.score).collect()
    assert (assemble_rollout(first, data) == ours).all()
    with pytest.raises(ValueError, match="3 frames and 3 steps"):
        assemble_rollout(first, data[:, :-1])


def test_torchrl_face_passes_its_checker() -> None:
    source = ToySource(prompts=2, group=2)
    check_env_specs(TorchRLEnv(source, source.score))
    env = TorchRLEnv(ToySource(group=2))
    assert (env.rollout(20, break_when_any_done=True)["next", "reward"] == 0).all()


def test_partial_resets_are_refused() -> None:
    env = TorchRLEnv(ToySource(group=2))
    env.reset()
    with pytest.raises(ValueError, match="batch-locked"):
        env.reset(TensorDict({"_reset": torch.tensor([[True], [False]])}, [2]))


def test_torchrl_face_loses_no_episode_of_an_advancing_source_and_can_be_seeded() -> None:
    env = TorchRLEnv(ToySource())
    assert [int(env.reset()["key"][0, 1]) for _ in range(3)] == [0, 1, 2]
    for seeded in (
        env,
        TorchRLEnv(ToySource()),
    ):  # one in use, one that holds the start it read its shapes from
        seeded.set_seed(11)
        assert seeded.reset()["key"][0, :2].tolist() == [11, 0]
    with pytest.raises(ValueError, match="cannot be seeded"):
        TorchRLEnv(lambda: ToySource()()).set_seed(1)


def test_a_scorer_of_the_wrong_shape_is_refused() -> None:
    env = TorchRLEnv(ToySource(group=2), lambda latents, frame: latents[:, frame])
    with pytest.raises(ValueError, match=r"scorer returned shape \(2, 2, 4, 4\) for frame 0"):
        env.rollout(3)


def test_gymnasium_face_passes_its_checker() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unbounded latents are meant
        env = gymnasium.make("ardrag/ARVideo-v0")
        check_env(env.unwrapped)
    env = gymnasium.make("ardrag/ARVideo-v0")
    assert env.reset(seed=3)[0]["key"].tolist() == [3, 0, 0, 0]


def test_vector_face_is_registered_and_has_no_autoreset() -> None:
    env = gymnasium.make_vec("ardrag/ARVideo-v0", num_envs=3, vectorization_mode="vector_entry_point")
    assert env.unwrapped.autoreset_mode == AutoresetMode.DISABLED == env.unwrapped.metadata["autoreset_mode"]
    state, _ = env.reset(seed=0)
    assert isinstance(state["latents"], torch.Tensor) and state["latents"].shape == (3, 3, 2, 4, 4)
    for _ in range(9):
        *_, done, _, info = env.step(torch.zeros(3, 2, 4, 4))
    assert done.all() and info["finished"].all()
    with pytest.raises(ValueError, match="call reset"):
        env.step(torch.zeros(3, 2, 4, 4))


def test_vector_face_works_in_torchrls_wrapper() -> None:
    env = GymWrapper(ARVideoVectorEnv(num_envs=2), convert_actions_to_numpy=False)
    assert env.reset()["latents"].shape == (2, 3, 2, 4, 4)


def test_a_batch_is_not_a_single_sample() -> None:
    with pytest.raises(ValueError, match="single sample, but its source starts 2"):
        ARVideoEnv(ToySource(group=2))


def test_three_faces_are_one_environment() -> None:
    """Same keys and same actions: identical states, rewards and ends."""
    states, actions, rewards = act(ToySource(value=4), CPSPolicy(error=0.2))
    a, b, c = ToySource(value=4), ToySource(value=4), ToySource(value=4)
    torchrl = TorchRLEnv(a, a.score)
    vector, single = ARVideoVectorEnv(b, b.score), ARVideoEnv(c, c.score)
    td = torchrl.reset()
    batch, _ = vector.reset()
    one, _ = single.reset()
    for i, action in enumerate(actions):
        for key in STATE_KEYS:
            assert torch.equal(td[key], states[i][key]) and torch.equal(batch[key], states[i][key])
            assert torch.equal(torch.from_numpy(one[key]), states[i][key][0])
        td = torchrl.step(td.set("action", action))["next"]
        batch, reward, done, truncated, info = vector.step(action)
        one, number, ended, cut, said = single.step(action[0].numpy())
        assert td["reward"].item() == reward.item() == number == rewards[i].item()
        assert td["done"].item() == done.item() == ended == (i == 8)
        assert info["finished"].item() == said["finished"] == (i % 3 == 2)
        assert not truncated.any() and not cut
    assert torch.equal(td["latents"], states[-1]["latents"]) and torch.equal(batch["latents"], td["latents"])
